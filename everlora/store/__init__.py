"""The learner directory: atomic, checksummed, versioned; JSON and safetensors only, no pickle."""

from __future__ import annotations

from everlora.store.changes import discard_checkpoints
from everlora.store.checkpoints import (
    StoredCheckpoint,
    checkpoint_folders,
    newest_checkpoint,
    read_checkpoint,
    task_of_checkpoint,
    write_checkpoint,
)
from everlora.store.directory import HEADER_KEYS_WITHOUT_EFFECT, LearnerStore
from everlora.store.files import MAX_JSON_BYTES
from everlora.store.forgetting import FORGOTTEN, Replacement, all_checkpoints, finish_forgetting, removed_arrays
from everlora.store.layout import (
    FORMAT_VERSION,
    RECORD_KEYS_WITHOUT_EFFECT,
    KeepStates,
    StateEntry,
    TaskData,
    TaskEntry,
)

__all__ = [
    "FORGOTTEN",
    "FORMAT_VERSION",
    "HEADER_KEYS_WITHOUT_EFFECT",
    "KeepStates",
    "LearnerStore",
    "MAX_JSON_BYTES",
    "RECORD_KEYS_WITHOUT_EFFECT",
    "Replacement",
    "StateEntry",
    "StoredCheckpoint",
    "TaskData",
    "TaskEntry",
    "all_checkpoints",
    "checkpoint_folders",
    "discard_checkpoints",
    "finish_forgetting",
    "newest_checkpoint",
    "read_checkpoint",
    "removed_arrays",
    "task_of_checkpoint",
    "write_checkpoint",
]
