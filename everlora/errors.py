"""The exceptions everlora raises on purpose.

```
EverloraError
├── OptionError (ValueError)         an option is unknown, of the wrong type or out of range
├── ShapeError (ValueError)          a tensor has the wrong shape, dtype or structure
├── NumericError (ValueError)        NaN or infinity where a finite number is needed
├── TargetError (ValueError)         a target pattern matches no layer, or a layer cannot be adapted
├── DataError (ValueError)           a data set, column, label or file of data is not usable
├── TaskCountError (ValueError)      more tasks than a schedule or method was declared for
├── ModelError (ValueError)          a base model cannot be loaded or is not the one expected
├── StoreError (ValueError)          a learner directory is missing, broken, newer or changed
│   └── LockedError                  another process is writing to the directory
├── ProcessError (RuntimeError)      of several processes that train together another one failed
├── InterruptedLearning (RuntimeError)   somebody asked for a stop while a task was learned
└── UnsupportedError (NotImplementedError)   a combination everlora declines, with the reason
```

Every message is one sentence that names the file, field or layer, says what was found, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "EverloraError",
    "InterruptedLearning",
    "LockedError",
    "ModelError",
    "NumericError",
    "OptionError",
    "ProcessError",
    "ShapeError",
    "StoreError",
    "TargetError",
    "TaskCountError",
    "UnsupportedError",
    "nearest",
]


class EverloraError(Exception):
    """Base of every exception everlora raises on purpose."""


class OptionError(EverloraError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class ShapeError(EverloraError, ValueError):
    """A tensor has the wrong shape, dtype or structure."""


class NumericError(EverloraError, ValueError):
    """NaN or infinity stands where a finite number is needed."""


class TargetError(EverloraError, ValueError):
    """A target pattern matches no layer, or names a layer that cannot be adapted."""


class DataError(EverloraError, ValueError):
    """A data set, column, label or data file is not usable."""


class TaskCountError(EverloraError, ValueError):
    """More tasks arrived than a schedule or method was declared for."""


class ModelError(EverloraError, ValueError):
    """A base model cannot be loaded, or is not the one that is expected."""


class StoreError(EverloraError, ValueError):
    """A learner directory is missing, broken, written by a newer version, or changed."""


class LockedError(StoreError):
    """Another process is writing to the learner directory."""


class ProcessError(EverloraError, RuntimeError):
    """Of several processes that train together another one failed."""


class InterruptedLearning(EverloraError, RuntimeError):
    """Somebody asked for a stop while a task was learned; the same command goes on."""


class UnsupportedError(EverloraError, NotImplementedError):
    """A combination of features that everlora declines, with the reason."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase that names the known words closest to `name`, for the end of an error message.

    Args:
        name: the word that was not recognised.
        known: all words that would have been accepted.
        count: how many suggestions to give at most.

    Returns:
        `"did you mean 'a' or 'b'?"` when something is close, else `"known: a, b, c"`.
    """
    words = sorted(set(known))
    close = difflib.get_close_matches(name, words, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{word}'" for word in close) + "?"
    return "known: " + ", ".join(words)
