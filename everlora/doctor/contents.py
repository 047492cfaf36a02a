"""The files of tasks, states and checkpoints: whether they are those that were written, and make sense."""

from __future__ import annotations

from collections.abc import Mapping

from everlora.doctor.arrays import adapter_shapes, check_adapter, check_config, check_finite, check_head, check_kept
from everlora.doctor.examination import Examination
from everlora.doctor.findings import RESTORE, broken, warning
from everlora.doctor.folders import Stray
from everlora.errors import StoreError
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from everlora.store import LearnerStore, StateEntry, TaskData, TaskEntry, checkpoint_folders, read_checkpoint
from everlora.store.files import load_arrays, load_json
from everlora.store.layout import LOG_FILE, STATE_ARRAYS_FILE, STATE_FILE, TASK_FILE, read_listed, read_manifest

__all__ = ["examine_checkpoints", "examine_state", "examine_task"]

ADDED_FILE, KEPT_FILE = "added.safetensors", "validation.safetensors"
_RESTORE_TASK = "restore the task from a backup"


def examine_task(seen: Examination, store: LearnerStore, entry: TaskEntry) -> None:
    """Check the manifest and the files of a task."""
    manifest = f"{entry.folder}/{TASK_FILE}"
    seen.listed.add(manifest)
    try:
        task = store.read_task(entry.index)
        content = read_manifest(seen.root, entry.folder, TASK_FILE, entry.sha256)
    except StoreError as error:
        seen.findings.append(seen.tell(error, manifest))
        seen.bad_tasks.add(entry.index)
        return
    problems = []
    if (content.get("index"), content.get("name")) != (entry.index, entry.name):
        problems.append(f"is of another task than '{entry.name}'")
    if not isinstance(task.record.get("values"), dict) or not isinstance(task.record.get("labels"), list):
        problems.append("has a record without labels or values")
    if problems:
        seen.findings += [broken(manifest, what) for what in problems]
        seen.bad_tasks.add(entry.index)
    for name in task.files:
        _examine_file(seen, task, name)


def _examine_file(seen: Examination, task: TaskData, name: str) -> None:
    file = f"{task.entry.folder}/{name}"
    seen.listed.add(file)
    try:
        data = read_listed(seen.root, task.entry.folder, task.manifest, name)
        findings = [broken(file, what, _RESTORE_TASK) for what in _problems(seen, task, name, data)]
    except StoreError as error:
        findings = [seen.tell(error, file)]
        if name == LOG_FILE:
            mend = f"{RESTORE}, or leave it: the learner needs no log"
            findings = [broken(file, findings[0].what, mend)]
    seen.findings += findings
    if findings and name != LOG_FILE:
        seen.bad_tasks.add(task.entry.index)


def _problems(seen: Examination, task: TaskData, name: str, data: bytes) -> list[str]:
    """What is wrong with a file whose bytes are those that were written."""
    path = seen.root / task.entry.folder / name
    last = name.rpartition("/")[2]
    if name == LOG_FILE:
        task.log()
    elif last == ADAPTER_CONFIG:
        return list(check_config(load_json(data, path), _ranks_beside(task, name)))
    elif path.suffix == ".json":
        load_json(data, path)
    if path.suffix != ".safetensors":
        return []
    arrays = load_arrays(data, path)
    found: list[str] = []
    if last == ADAPTER_WEIGHTS:
        found += [*check_finite(arrays), *check_adapter(arrays, seen.shapes)]
    elif name == ADDED_FILE:
        values = task.record.get("values")
        found += check_finite(arrays, "head/")
        found += check_head(arrays, values if isinstance(values, Mapping) else {}, seen.widths)
    elif name == KEPT_FILE:
        found += check_kept(arrays)
    return found


def _ranks_beside(task: TaskData, config: str) -> dict[str, int]:
    """Rank of each layer in the weights beside an adapter_config.json; empty where they cannot be read."""
    weights = config.removesuffix(ADAPTER_CONFIG) + ADAPTER_WEIGHTS
    try:
        shapes = adapter_shapes(task.arrays(weights)) if weights in task.files else {}
    except StoreError:
        return {}  # which is said of the weights
    return {layer: down[0] for layer, (down, _) in shapes.items() if down}


def examine_state(seen: Examination, entry: StateEntry) -> None:
    """Check what was carried on after a task."""
    manifest, arrays = f"{entry.folder}/{STATE_FILE}", f"{entry.folder}/{STATE_ARRAYS_FILE}"
    seen.listed |= {manifest, arrays}
    file = manifest
    try:
        content = read_manifest(seen.root, entry.folder, STATE_FILE, entry.sha256)
        seen.listed |= {f"{entry.folder}/{name}" for name in content["files"]}
        if content.get("index") != entry.index or not isinstance(content.get("values"), dict):
            raise StoreError(f"{seen.root / manifest} is of another task or has no values; {RESTORE}")
        file = arrays
        data = read_listed(seen.root, entry.folder, content["files"], STATE_ARRAYS_FILE)
        load_arrays(data, seen.root / arrays)
        problems = []
    except StoreError as error:
        problems = [seen.tell(error, file)]
    if problems:
        seen.findings += problems
        seen.bad_states.add(entry.index)


def examine_checkpoints(seen: Examination) -> None:
    """Check the checkpoints of an unfinished task; a broken one is passed over when the task goes on."""
    for folder in checkpoint_folders(seen.root):
        place = folder.relative_to(seen.root).as_posix()
        try:
            read_checkpoint(seen.root, folder)
        except StoreError as error:
            what = f"is broken and is passed over when the task goes on ({str(error).partition('; ')[0]})"
            seen.findings.append(warning(place, what, "leave it, or let --repair move it"))
            seen.strays.append(Stray(place, "checkpoint"))
