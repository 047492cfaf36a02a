"""everlora: continual learning for pretrained models with low-rank adapters.

The names most people need are [`Learner`][everlora.learner.Learner], [`run`][everlora.experiments.run] and
[`compare`][everlora.comparison.compare]. They are resolved on first use, so that `import everlora` and the command
line's help stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlora.comparison import compare
    from everlora.experiments import run
    from everlora.learner import Learner

__version__ = "0.1.0"
__all__ = ["Learner", "__version__", "compare", "run"]

_HOMES = {"Learner": "everlora.learner", "compare": "everlora.comparison", "run": "everlora.experiments"}


def __getattr__(name: str) -> Any:
    """Import these when they are first asked for: `Learner` and `run` bring torch with them."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'everlora' has no attribute '{name}'")
