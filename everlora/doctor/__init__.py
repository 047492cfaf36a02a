"""Examine a learner directory, say what is wrong with it and how to mend it, and put aside what does not belong."""

from __future__ import annotations

from everlora.doctor.examine import examine
from everlora.doctor.findings import Finding
from everlora.doctor.repair import Repaired, repair, way_back

__all__ = ["Finding", "Repaired", "examine", "repair", "way_back"]
