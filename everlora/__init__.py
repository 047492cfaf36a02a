"""everlora: continual learning for pretrained models with low-rank adapters.

The two names most people need are [`Learner`][everlora.learner.Learner] and [`run`][everlora.experiments.run].
They are resolved on first use, so that `import everlora` and the command line's help stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlora.experiments import run
    from everlora.learner import Learner

__version__ = "0.1.0"
__all__ = ["Learner", "__version__", "run"]

_HOMES = {"Learner": "everlora.learner", "run": "everlora.experiments"}


def __getattr__(name: str) -> Any:
    """Import `Learner` and `run` when they are first asked for: they bring torch with them."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'everlora' has no attribute '{name}'")
