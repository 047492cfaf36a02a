"""Search for options on training rows alone. `sweep` brings torch when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlora.sweep.search import sweep

__all__ = ["sweep"]


def __getattr__(name: str) -> Any:
    """Import `sweep` on first use."""
    if name == "sweep":
        from everlora.sweep.search import sweep

        return sweep
    raise AttributeError(f"module 'everlora.sweep' has no attribute '{name}'")
