"""Low-rank maths on single layers: second moments, the gradient memory, adapted layers.

Knows nothing of tasks, methods or files, so that it can serve any training loop.
"""

from __future__ import annotations

from everlora.lowrank.attach import attach, detach, input_groups, share_down
from everlora.lowrank.layer import LowRankLinear
from everlora.lowrank.memory import GradientMemory
from everlora.lowrank.moments import SecondMoment, record_moments, unfold_patches
from everlora.lowrank.sharing import InputGroup
from everlora.lowrank.thresholds import ConstantThreshold, GeometricThreshold, LinearThreshold
from everlora.lowrank.working import Block

__all__ = [
    "Block",
    "ConstantThreshold",
    "GeometricThreshold",
    "GradientMemory",
    "InputGroup",
    "LinearThreshold",
    "LowRankLinear",
    "SecondMoment",
    "attach",
    "detach",
    "input_groups",
    "record_moments",
    "share_down",
    "unfold_patches",
]
