"""Low-rank maths on single layers: second moments, the gradient memory, adapted layers.

Knows nothing of tasks, methods or files, so that it can serve any training loop.
"""

from __future__ import annotations

from everlora.lowrank.attach import attach, detach, input_groups, share_down
from everlora.lowrank.compression import DirectionSum, allocate_ranks, compress, plan_merge
from everlora.lowrank.directions import DirectionFit, cosines, fit_direction, gram
from everlora.lowrank.factors import Direction, direction_norm, kappa
from everlora.lowrank.fused import FusedProjection, join_factors, slice_names, split_factors
from everlora.lowrank.layer import LowRankLinear
from everlora.lowrank.memory import GradientMemory
from everlora.lowrank.moments import SecondMoment, record_moments, unfold_patches
from everlora.lowrank.sharing import InputGroup
from everlora.lowrank.thresholds import ConstantThreshold, GeometricThreshold, LinearThreshold
from everlora.lowrank.working import Block

__all__ = [
    "Block",
    "ConstantThreshold",
    "Direction",
    "DirectionFit",
    "DirectionSum",
    "FusedProjection",
    "GeometricThreshold",
    "GradientMemory",
    "InputGroup",
    "LinearThreshold",
    "LowRankLinear",
    "SecondMoment",
    "allocate_ranks",
    "attach",
    "compress",
    "cosines",
    "detach",
    "direction_norm",
    "fit_direction",
    "gram",
    "input_groups",
    "join_factors",
    "kappa",
    "plan_merge",
    "record_moments",
    "share_down",
    "slice_names",
    "split_factors",
    "unfold_patches",
]
