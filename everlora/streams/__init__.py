"""Data sets to streams of tasks: loading, class orders, splits. `augment` and `keyed` are the parts that need torch."""

from everlora.streams.dialogue_rows import parse_row
from everlora.streams.dialogues import check_dialogue_columns, load_dialogue_splits, load_dialogues
from everlora.streams.examples import Examples, Modality, concatenate
from everlora.streams.orders import class_order
from everlora.streams.registry import NamedSource, list_sources, register_source
from everlora.streams.source import Columns, LoadOptions, load_examples, load_splits
from everlora.streams.splits import hold_out, hold_out_rows, take_per_class
from everlora.streams.stream import Stream, Task, by_class, by_column, by_datasets

__all__ = [
    "Columns",
    "Examples",
    "LoadOptions",
    "Modality",
    "NamedSource",
    "Stream",
    "Task",
    "by_class",
    "by_column",
    "by_datasets",
    "check_dialogue_columns",
    "class_order",
    "concatenate",
    "hold_out",
    "hold_out_rows",
    "list_sources",
    "load_dialogue_splits",
    "load_dialogues",
    "load_examples",
    "load_splits",
    "parse_row",
    "register_source",
    "take_per_class",
]
