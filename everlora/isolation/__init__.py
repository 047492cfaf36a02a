"""Networks that hold a version of some modules for each task, their batch norms, and finding out whose task it is."""

from everlora.isolation.adapters import AdapterPlan, Scaling, adapter_targets, factors_of, factors_to_rows
from everlora.isolation.norms import (
    NOT_SHARED,
    NormMode,
    batch_norms,
    has_batch_norm,
    norm_copies,
    norm_layers,
    set_statistics_moving,
    statistics_move,
    train_by_mode,
)
from everlora.isolation.parts import find_blocks, parts_of, unread_children
from everlora.isolation.recognition import RULES, Recogniser, Rule, fit_temperature
from everlora.isolation.task_modules import TaskModules

__all__ = [
    "NOT_SHARED",
    "RULES",
    "AdapterPlan",
    "NormMode",
    "Recogniser",
    "Rule",
    "Scaling",
    "TaskModules",
    "adapter_targets",
    "batch_norms",
    "factors_of",
    "factors_to_rows",
    "find_blocks",
    "fit_temperature",
    "has_batch_norm",
    "norm_copies",
    "norm_layers",
    "parts_of",
    "set_statistics_moving",
    "statistics_move",
    "train_by_mode",
    "unread_children",
]
