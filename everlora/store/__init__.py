"""The learner directory: atomic, checksummed, versioned; JSON and safetensors only, no pickle."""

from __future__ import annotations

from everlora.store.directory import HEADER_KEYS_WITHOUT_EFFECT, LearnerStore
from everlora.store.files import MAX_JSON_BYTES
from everlora.store.layout import (
    FORMAT_VERSION,
    RECORD_KEYS_WITHOUT_EFFECT,
    KeepStates,
    StateEntry,
    TaskData,
    TaskEntry,
)

__all__ = [
    "FORMAT_VERSION",
    "HEADER_KEYS_WITHOUT_EFFECT",
    "KeepStates",
    "LearnerStore",
    "MAX_JSON_BYTES",
    "RECORD_KEYS_WITHOUT_EFFECT",
    "StateEntry",
    "TaskData",
    "TaskEntry",
]
