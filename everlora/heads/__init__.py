"""Heads: classifiers that grow with the tasks and the ways to calibrate them, and the output of a language model."""

from everlora.heads.alignment import Aligner, AlignmentOptions, ClassStatistics, align_heads
from everlora.heads.class_means import competing, rows_of_means
from everlora.heads.drift import Drift, DriftSums
from everlora.heads.language_head import LanguageHead
from everlora.heads.statistical import HeadOptions, StatisticalHead, held_out
from everlora.heads.statistics import FeatureStatistics
from everlora.heads.task_heads import HeadRows, TaskHeads

__all__ = [
    "Aligner",
    "AlignmentOptions",
    "ClassStatistics",
    "Drift",
    "DriftSums",
    "FeatureStatistics",
    "HeadOptions",
    "HeadRows",
    "LanguageHead",
    "StatisticalHead",
    "TaskHeads",
    "align_heads",
    "competing",
    "held_out",
    "rows_of_means",
]
