"""Examine a learner directory, say what is wrong and how to mend it; and look at data and recipes before training.

`examine` and `repair` are of the directory and need no torch; `examine_data` and `examine_recipe` try things out, and
bring it when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everlora.doctor.examine import examine
from everlora.doctor.findings import Finding
from everlora.doctor.repair import Repaired, repair, way_back

if TYPE_CHECKING:
    from everlora.doctor.before import examine_data, examine_recipe

__all__ = ["Finding", "Repaired", "examine", "examine_data", "examine_recipe", "repair", "way_back"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name in ("examine_data", "examine_recipe"):
        from everlora.doctor import before

        return getattr(before, name)
    raise AttributeError(f"module 'everlora.doctor' has no attribute '{name}'")
