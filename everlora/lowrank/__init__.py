"""Low-rank maths on single layers: second moments, the gradient memory, adapted layers.

Knows nothing of tasks, methods or files, so that it can serve any training loop.
"""

from __future__ import annotations

from everlora.lowrank.adapted import LowRankLayer
from everlora.lowrank.attach import attach, detach, input_groups, share_down
from everlora.lowrank.compression import DirectionSum, compress
from everlora.lowrank.directions import cosines, fit_direction, gram
from everlora.lowrank.exchange import exchanged, interpolate_, retention
from everlora.lowrank.factors import Direction
from everlora.lowrank.fused import FusedProjection, join_factors, split_factors
from everlora.lowrank.layer import AdaptedLayer, LowRankConv2d, LowRankLinear
from everlora.lowrank.memory import GradientMemory
from everlora.lowrank.moments import SecondMoment, record_moments
from everlora.lowrank.targets import capped_ranks, find_targets, rank_cap
from everlora.lowrank.thresholds import ConstantThreshold, GeometricThreshold, LinearThreshold
from everlora.lowrank.working import Block

__all__ = [
    "AdaptedLayer",
    "Block",
    "ConstantThreshold",
    "Direction",
    "DirectionSum",
    "FusedProjection",
    "GeometricThreshold",
    "GradientMemory",
    "LinearThreshold",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "SecondMoment",
    "attach",
    "capped_ranks",
    "compress",
    "cosines",
    "detach",
    "exchanged",
    "find_targets",
    "fit_direction",
    "gram",
    "input_groups",
    "interpolate_",
    "join_factors",
    "rank_cap",
    "record_moments",
    "retention",
    "share_down",
    "split_factors",
]
