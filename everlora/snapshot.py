"""A method's memory as files of a learner directory, and back.

`Method.state` is one flat mapping. Entries under `tasks/000/` were added by that task and are written once, in its
folder: low-rank factors in PEFT's own layout, other tensors in `added.safetensors`, plain values in the task's record.
A task may have more than one adapter: `stable/adapter/...` and `plastic/adapter/...` go to folders of these names.
A task's value `alphas`, layer to number, says that its factors count with alpha over rank instead of 1.
Everything else is what the method carries on, and goes to `state/000`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.methods.base import State
from everlora.methods.keys import task_key
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, from_peft_tensors, lora_config, to_peft_tensors
from everlora.store import LearnerStore

__all__ = ["ADDED_FILE", "TaskFiles", "join_state", "split_state"]

ADDED_FILE = "added.safetensors"
_FACTOR = re.compile(r"((?:[^/]+/)?)adapter/(.+)/(down|up)")
Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class TaskFiles:
    """What one task adds to a directory.

    Attributes:
        arrays: file name -> named arrays, for the task's folder.
        documents: file name -> JSON object, for the task's folder.
        values: plain values, for the task's record.
        state_arrays: arrays the method carries on.
        state_values: plain values the method carries on.
    """

    arrays: dict[str, Arrays] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    state_arrays: Arrays = field(default_factory=dict)
    state_values: dict[str, Any] = field(default_factory=dict)


def split_state(state: Mapping[str, Any], index: int) -> TaskFiles:
    """Sort a method's state into the files of its newest task and what it carries on.

    Args:
        state: of the method, after task `index`.
        index: the newest task; entries of earlier tasks are on disk already and are left out.
    """
    files = TaskFiles()
    prefix = task_key(index, "")
    adapters: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        factor = _FACTOR.fullmatch(name) if key.startswith(prefix) else None
        if factor is not None:
            folder, layer, side = factor.groups()
            adapters.setdefault(folder, {}).setdefault(layer, {})[side] = value
        elif key.startswith(prefix):
            if isinstance(value, Tensor):
                files.arrays.setdefault(ADDED_FILE, {})[name] = _array(value)
            else:
                files.values[name] = value
        elif not key.startswith("tasks/"):
            if isinstance(value, Tensor):
                files.state_arrays[key] = _array(value)
            else:
                files.state_values[key] = value
    for folder, factors in adapters.items():
        pairs = {layer: (_array(sides["down"]), _array(sides["up"])) for layer, sides in factors.items()}
        files.arrays[folder + ADAPTER_WEIGHTS] = to_peft_tensors(pairs)
        ranks = {layer: up.shape[1] for layer, (_, up) in pairs.items()}
        if any(ranks.values()):  # a task without a single free direction has no adapter that PEFT could describe
            files.documents[folder + ADAPTER_CONFIG] = lora_config(ranks, alphas=files.values.get("alphas"))
    return files


def join_state(store: LearnerStore) -> State:
    """Read back, verified, what the method's `state` returned after the newest task.

    Raises:
        StoreError: a file is missing or changed.
    """
    state: State = {}
    for entry in store.tasks:
        task = store.read_task(entry.index)
        for name, value in task.record["values"].items():
            state[task_key(entry.index, name)] = value
        if ADDED_FILE in task.files:
            for name, array in task.arrays(ADDED_FILE).items():
                state[task_key(entry.index, name)] = torch.from_numpy(np.array(array))
        for file in task.files:
            if file.rpartition("/")[2] == ADAPTER_WEIGHTS:
                prefix = task_key(entry.index, file.removesuffix(ADAPTER_WEIGHTS) + "adapter/")
                for layer, pair in from_peft_tensors(task.arrays(file)).items():
                    for side, factor in zip(("down", "up"), pair, strict=True):
                        state[f"{prefix}{layer}/{side}"] = torch.from_numpy(np.array(factor))
    if store.tasks:
        arrays, values = store.read_state()
        state.update({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
        state.update(values)
    return state


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype in (torch.bfloat16, torch.float16):
        plain = plain.float()
    return plain.numpy()
