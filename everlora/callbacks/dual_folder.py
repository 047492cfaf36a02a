"""The folder of an I-LoRA task: `stable/` and `plastic/` for plain PEFT, `state/` for the task after it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from torch import Tensor

from everlora.callbacks.adapters import adapter_config, adapter_tensors, check_config
from everlora.callbacks.dual_memory import DualMemory
from everlora.callbacks.folders import adapter_files, dump_tensors, load_tensors, read_record, write_folder
from everlora.callbacks.stable import check_shapes
from everlora.errors import StoreError
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from everlora.store.files import checksum, load_json, read_bytes, replace_file, writing

__all__ = ["load_checkpoint", "load_task", "save_checkpoint", "save_task"]

logger = logging.getLogger("everlora.callbacks")

_FORMAT = 1
_RECORD = "state/ilora.json"
_BUFFER = "state/buffer.safetensors"
_STABLE = "state/stable.safetensors"
_CHECKPOINT = "ilora.json"
_CHECKPOINT_STABLE = "stable.safetensors"
_NAMES = ("stable", "ema", "ema_adapter")  # never the root, where PEFT has the adapter named default


def save_task(folder: Path, dual: DualMemory, *, output_dir: Path) -> None:
    """Write both adapters and the state of a task that is done.

    Raises:
        StoreError: the folder holds something, or the disk refuses.
    """
    arguments = dual.arguments
    config = adapter_config(dual.model, dual.adapter)
    plastic = adapter_files(adapter_tensors(dual.model, dual.adapter), config)
    with dual.stable.in_place():
        tensors = adapter_tensors(dual.model, dual.adapter)
    stable = adapter_files(tensors, config)
    files = {f"plastic/{name}": data for name, data in plastic.items()}
    elsewhere = _resolve(arguments.ema_adapter_path, output_dir)
    if not arguments.save_ema_adapter or elsewhere is not None:  # what lies elsewhere is written later, or not at all
        files[_STABLE] = stable[ADAPTER_WEIGHTS]
    else:
        files.update({f"stable/{name}": data for name, data in stable.items()})
    if arguments.save_buffer and len(dual.memory):
        files[_BUFFER] = dump_tensors(dual.memory.state())
    record = {
        "format": _FORMAT,
        "arguments": arguments.plain(),
        "updates": dual.updates,
        "last_retention": dual.last_retention,
        "history": dual.history,
        "base_model": config["base_model_name_or_path"],
        "vocab_size": dual.vocab_size,
        "memory": {"examples": len(dual.memory), "seen": dual.memory.num_seen, "bytes": dual.memory.nbytes},
        "stable_sha256": checksum(stable[ADAPTER_WEIGHTS]),
    }
    write_folder(folder, files, (_RECORD, record))
    if arguments.save_ema_adapter and elsewhere is not None:
        with writing(elsewhere):
            elsewhere.mkdir(parents=True, exist_ok=True)
            for name, data in stable.items():
                replace_file(elsewhere / name, data)


def load_task(folder: Path, dual: DualMemory, *, output_dir: Path) -> None:
    """Continue from the folder of the task before: both adapters, the memory, `k` and the names of the tasks.

    Raises:
        StoreError: the folder is damaged, lacks an adapter, or was made with other settings or after another task.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / _RECORD).is_file():
        _load_plain(folder, dual)
        return
    record, files = read_record(folder, _RECORD)
    if record.get("format") != _FORMAT:
        raise StoreError(f"{folder}: expected format {_FORMAT}, found {record.get('format')!r}; update everlora")
    last = record["history"][-1]
    if dual.arguments.prev_task_id not in (None, last):
        raise StoreError(
            f"{folder}: expected the task '{dual.arguments.prev_task_id}', found '{last}'; check the order"
        )
    if record["vocab_size"] != dual.vocab_size:
        raise StoreError(
            f"{folder}: expected a vocabulary of {dual.vocab_size} tokens, found {record['vocab_size']}; use the same "
            "base model and tokenizer"
        )
    saved = json.loads(files[f"plastic/{ADAPTER_CONFIG}"])
    check_config(saved, dual.model, dual.adapter, folder=folder / "plastic")
    weights = folder / "plastic" / ADAPTER_WEIGHTS
    plastic = load_tensors(files[f"plastic/{ADAPTER_WEIGHTS}"], weights)
    stable, source = _find_stable(folder, files, record, _resolve(dual.arguments.ema_adapter_path, output_dir))
    _put(dual, plastic, source=weights)
    with dual.stable.in_place():
        _put(dual, stable, source=source)
    if _BUFFER in files:
        dual.memory.load_state(load_tensors(files[_BUFFER], folder / _BUFFER))
    elif record["memory"]["examples"]:
        logger.warning("%s was written with save_buffer=False: nothing of earlier tasks is replayed", folder)
    dual.updates = int(record["updates"])
    dual.history = [str(name) for name in record["history"]]


def save_checkpoint(folder: Path, dual: DualMemory) -> None:
    """Write what a checkpoint within a task needs beside the Trainer's own files; replaces an older one."""
    if folder.exists():
        shutil.rmtree(folder)
    record = {"format": _FORMAT, "task_id": dual.task_id, "updates": dual.updates}
    write_folder(folder, {_CHECKPOINT_STABLE: dump_tensors(dual.stable.state())}, (_CHECKPOINT, record))


def load_checkpoint(folder: Path, dual: DualMemory) -> None:
    """Put back what `save_checkpoint` wrote.

    Raises:
        StoreError: the checkpoint has none of it, is damaged, or is one of another task.
    """
    if not folder.is_dir():
        raise StoreError(
            f"expected {folder} with the stable adapter, found none; resume from a checkpoint of this trainer"
        )
    record, files = read_record(folder, _CHECKPOINT)
    if record["task_id"] != dual.task_id:
        raise StoreError(f"{folder}: expected the task '{dual.task_id}', found '{record['task_id']}'; check the paths")
    dual.stable.load_state(load_tensors(files[_CHECKPOINT_STABLE], folder / _CHECKPOINT_STABLE), source=folder)
    dual.updates = int(record["updates"])


def _load_plain(folder: Path, dual: DualMemory) -> None:
    config = load_json(read_bytes(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    check_config(config, dual.model, dual.adapter, folder=folder)
    weights = folder / ADAPTER_WEIGHTS
    tensors = load_tensors(read_bytes(weights), weights)
    _put(dual, tensors, source=weights)
    with dual.stable.in_place():
        _put(dual, tensors, source=weights)
    dual.history = [dual.arguments.prev_task_id or folder.name]
    logger.warning(
        "%s is a plain adapter: both adapters start from it, and nothing of earlier tasks is replayed", folder
    )


def _find_stable(
    folder: Path, files: Mapping[str, bytes], record: Mapping[str, Any], elsewhere: Path | None
) -> tuple[dict[str, Tensor], Path]:
    """Find the stable adapter of the task before; it must be the one that was saved then."""
    candidates = [*([elsewhere] if elsewhere is not None else []), *(folder / name for name in _NAMES)]
    paths = [path / ADAPTER_WEIGHTS for path in candidates]
    found = next((path for path in paths if path.is_file()), None)
    if _STABLE in files:
        path, data = folder / _STABLE, files[_STABLE]
    elif found is None:
        tried = ", ".join(str(path) for path in paths)
        raise StoreError(f"expected the stable adapter of the task before, found none; tried {tried}")
    else:
        path, data = found, read_bytes(found)
    if checksum(data) != record["stable_sha256"]:
        raise StoreError(f"{path} is not the stable adapter that was saved with {folder}: its sha256 differs")
    return load_tensors(data, path), path


def _put(dual: DualMemory, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Load an adapter by the names PEFT gives its files, into the parameters that are in place."""
    check_shapes(adapter_tensors(dual.model, dual.adapter), tensors, source=source)
    set_peft_model_state_dict(dual.model, dict(tensors), adapter_name=dual.adapter)


def _resolve(path: str | Path | None, output_dir: Path) -> Path | None:
    return None if path is None else output_dir / path
