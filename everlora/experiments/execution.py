"""One row with one seed: learn the stream's tasks and measure after each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everlora.errors import DataError, StoreError
from everlora.experiments.data import Progress
from everlora.experiments.paths import has_path, measured_pair
from everlora.experiments.plan import Plan, Streams, identity, method_row, row_options
from everlora.experiments.recipe import stream_of
from everlora.experiments.records import RunRecord
from everlora.experiments.traces import bytes_on_disk, pretrained_digest, reference_parameters, tensor_digests
from everlora.learner import Learner
from everlora.streams import Examples, Stream, concatenate

__all__ = ["execute", "run_folder"]


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Folder of one row and seed: `run.json` and the learner's own directory `learner/`."""
    return out / f"{row}-{seed}"


def execute(plan: Plan, row: str, seed: int, *, streams: Streams, out: Path, progress: Progress) -> dict[str, Any]:
    """Run one row with one seed, from where an earlier run of it stopped.

    After each task the test sets of all tasks seen so far are evaluated, and only then; a method that takes the
    whole stream at once is measured once, at the end. Where the plan asks for paths, accuracy is measured between
    the weights after a task and after the one before too; a finished run gets those that it still lacks.

    Args:
        plan: the plan.
        row: name of the row.
        seed: the seed: of the order, where the recipe says so, and of everything the learner draws.
        streams: gives the seed's stream.
        out: folder of the whole experiment.
        progress: called with a stage, the steps done and their number.

    Returns:
        The finished record, as plain values.

    Raises:
        OptionError: an earlier run in the folder had other options.
        StoreError: the learner and its record do not fit together.
    """
    stream = streams(seed)
    record = _open_record(plan, row, seed, stream, run_folder(out, row, seed))
    pairs = _wanted_pairs(plan, record)
    if record.is_complete and not pairs:
        return record.values
    stage = f"{record.values['label']}, seed {seed}"
    progress(stage, record.rows_done, len(stream.tasks))
    learner = _open_learner(plan, row, record)
    _note_the_start(plan, record, learner, num_classes=len(stream.tasks[0].labels))
    if learner.trains_on == "stream":
        _learn_whole(learner, record, stream, _prefixed(progress, stage))
        progress(stage, len(stream.tasks), len(stream.tasks))
    else:
        inner = _prefixed(progress, stage)
        paths = _Paths(learner, record, stream, plan.path_points, pairs, inner)
        _learn_in_turn(learner, record, stream, stage, progress, after_each=paths.measure)
    return record.values


def _wanted_pairs(plan: Plan, record: RunRecord) -> list[int]:
    """First tasks of the paths that were asked for and are not measured yet."""
    if not plan.path_points or not has_path(record.values["registered_method"]):
        return []
    return [first for first in range(record.values["num_tasks"] - 1) if record.lacks_path(first, plan.path_points)]


def _open_record(plan: Plan, row: str, seed: int, stream: Stream, folder: Path) -> RunRecord:
    spec = method_row(plan.recipe, row)
    options = row_options(plan, row, seed, len(stream.tasks))
    scenario = stream_of(plan.recipe, plan.setting).scenario
    header = {
        "method": row,
        "registered_method": spec.method,
        "label": spec.label or row,
        "seed": seed,
        "options": options,
        "scenario": scenario,
        "model": plan.model,
        "stream": stream.describe(),
    }
    # The label is only for readers; a change of it must not cost a rerun.
    decisive = {key: value for key, value in header.items() if key != "label"}
    fingerprints = [[task.train.fingerprint, _test_of(task).fingerprint] for task in stream.tasks]
    return RunRecord.open(
        folder / "run.json",
        identity=identity({**decisive, "fingerprints": fingerprints}),
        header=header,
        num_tasks=len(stream.tasks),
    )


def _note_the_start(plan: Plan, record: RunRecord, learner: Learner, *, num_classes: int) -> None:
    """Put in what later figures are compared with: the size, and if a claim asks for it the pretrained tensors."""
    if record.rows_done:
        return
    record.values["reference_parameters"] = reference_parameters(learner, num_classes)
    record.values["recognition"] = learner.settings.as_parts()["method"].get("select")
    if any(claim.test == "unchanged" for claim in plan.recipe.claims.values()):
        record.values["pretrained_digest"] = pretrained_digest(learner)
        record.values["digests"] = []


def _open_learner(plan: Plan, row: str, record: RunRecord) -> Learner:
    folder = record.path.parent / "learner"
    if (folder / "learner.json").exists():
        return Learner.open(folder)
    if record.rows_done:
        raise StoreError(f"{folder} is gone, but {record.path} says it had learned; remove that file to start again.")
    values = record.values
    return Learner.create(
        folder,
        model=plan.model,
        method=values["registered_method"],
        scenario=values["scenario"],
        **values["options"],
    )


@dataclasses.dataclass
class _Paths:
    """The paths between weights that a run still has to measure; they are by their first tasks in `pairs`."""

    learner: Learner
    record: RunRecord
    stream: Stream
    points: int
    pairs: list[int]
    progress: Progress

    def measure(self) -> None:
        """Measure every path between tasks that are learned already."""
        while self.pairs and self.pairs[0] + 1 < len(self.learner.tasks):
            first = self.pairs.pop(0)
            tests = [_test_of(task) for task in self.stream.tasks[: first + 2]]
            entry = measured_pair(self.learner, first, tests, self.points, progress=self.progress)
            if entry is None:
                self.pairs.clear()
                return
            self.record.keep_path(entry)


def _learn_in_turn(
    learner: Learner,
    record: RunRecord,
    stream: Stream,
    stage: str,
    progress: Progress,
    *,
    after_each: Callable[[], None],
) -> None:
    ahead = len(learner.tasks) - record.rows_done
    if ahead not in (0, 1):
        raise StoreError(
            f"{learner.path} holds {len(learner.tasks)} tasks and {record.path} {record.rows_done} measured ones; "
            "one of them was changed, so choose another folder with --out."
        )
    for index in range(record.rows_done, len(stream.tasks)):
        # A run killed between learning and measuring has the task already, and still has to measure it.
        if index == len(learner.tasks):
            task = stream.tasks[index]
            learner.learn(task.train, name=task.name, progress=_prefixed(progress, stage))
        _measure(learner, record, stream, index, learned=index)
        after_each()
        progress(stage, index + 1, len(stream.tasks))
    after_each()


def _learn_whole(learner: Learner, record: RunRecord, stream: Stream, progress: Progress) -> None:
    if not learner.tasks:
        learner.learn(concatenate([task.train for task in stream.tasks]), name="all-tasks", progress=progress)
    _measure(learner, record, stream, len(stream.tasks) - 1, learned=0)


def _measure(learner: Learner, record: RunRecord, stream: Stream, index: int, *, learned: int) -> None:
    """Fill row `index`; `learned` is the task of the learner whose cost and figures belong to it."""
    pairs = [(task.index, _test_of(task)) for task in stream.tasks[: index + 1]]
    counts = learner.evaluate_tasks(pairs)
    kept = learner.card()["tasks"][learned]
    cost = kept["cost"] | {"task": index, "seconds": kept["cost"]["seconds"]["total"], "parts": kept["cost"]["seconds"]}
    cost["state_bytes"] = bytes_on_disk(learner)
    if "digests" in record.values:
        record.values["digests"].append(tensor_digests(learner))
    record.append([dataclasses.asdict(one) for one in counts], cost=cost, panels=kept["panels"], task=index)


def _test_of(task: Any) -> Examples:
    if task.test is None:
        raise DataError(f"task '{task.name}' has no test examples; give data with a test split.")
    test: Examples = task.test
    return test


def _prefixed(progress: Progress, stage: str) -> Progress:
    return lambda inner, done, total: progress(f"{stage}: {inner}", done, total)
