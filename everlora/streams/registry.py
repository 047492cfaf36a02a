"""Named data sets that need no file: one decorated function each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from everlora.errors import DataError, nearest
from everlora.streams.examples import Examples

__all__ = ["NamedSource", "find_source", "list_sources", "register_source"]

Loader = Callable[[], dict[str, Examples]]


@dataclass(frozen=True)
class NamedSource:
    """A registered data set.

    Attributes:
        name: `provider:set`, as a user types it.
        summary: one line for listings.
        load: returns its splits; always `"train"`, and `"validation"` and `"test"` where it has them.
    """

    name: str
    summary: str
    load: Loader


_SOURCES: dict[str, NamedSource] = {}


def register_source(name: str) -> Callable[[Loader], Loader]:
    """Register a function that returns the splits of a data set under a name.

    Args:
        name: `provider:set`, lower case; the colon keeps it apart from paths and hub ids.

    Returns:
        A decorator that returns the function unchanged; the docstring's first line becomes the summary.

    Raises:
        DataError: the name is malformed or taken, or the function has no docstring.
    """
    if not re.fullmatch(r"[a-z0-9_]+:[a-z0-9_-]+", name):
        raise DataError(f"data set name '{name}' is not of the form 'provider:set' in lower case")
    if name in _SOURCES:
        raise DataError(f"data set name '{name}' is already registered; choose another")

    def decorate(load: Loader) -> Loader:
        summary = (load.__doc__ or "").strip().split("\n")[0]
        if not summary:
            raise DataError(f"data set '{name}' needs a docstring, whose first line describes it in listings")
        _SOURCES[name] = NamedSource(name=name, summary=summary, load=load)
        return load

    return decorate


def list_sources() -> tuple[NamedSource, ...]:
    """Return all registered data sets, sorted by name."""
    return tuple(_SOURCES[name] for name in sorted(_SOURCES))


def find_source(name: str) -> NamedSource:
    """Return the data set registered under a name.

    Args:
        name: as registered.

    Returns:
        The registered data set.

    Raises:
        DataError: nothing is registered under this name; the nearest names are given.
    """
    if name not in _SOURCES:
        raise DataError(f"no data set is registered as '{name}'; {nearest(name, _SOURCES)}")
    return _SOURCES[name]
