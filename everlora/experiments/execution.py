"""One row with one seed: learn the stream's tasks and measure after each of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everlora.errors import OptionError, StoreError
from everlora.experiments.data import Progress
from everlora.experiments.language import LanguageMeasurement
from everlora.experiments.measuring import ClassMeasurement, Measurement, rows_to_test
from everlora.experiments.paths import has_path, measured_pair
from everlora.experiments.plan import Plan, StreamSource, identity, method_row, row_options
from everlora.experiments.recipe import stream_of
from everlora.experiments.records import RunRecord
from everlora.experiments.retention import own_texts
from everlora.experiments.traces import bytes_on_disk, pretrained_digest, reference_parameters, tensor_digests
from everlora.experiments.tracked import moment_figures, open_trackers
from everlora.learner import Learner
from everlora.store.changes import take_lock
from everlora.store.files import writing
from everlora.streams import Examples, Stream, concatenate
from everlora.tracking import Trackers
from everlora.training import stop_if_asked

__all__ = ["execute", "run_folder"]

_NO_RATE = 1e-12


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Folder of one row and seed: `run.json` and the learner's own directory `learner/`."""
    return out / f"{row}-{seed}"


def execute(
    plan: Plan,
    row: str,
    seed: int,
    *,
    streams: StreamSource,
    out: Path,
    progress: Progress,
    measurement: Measurement | None = None,
) -> dict[str, Any]:
    """Run one row with one seed, from where an earlier run of it stopped.

    After each task the test sets of all tasks seen so far are evaluated, and only then; those of a language model
    also before the first task, and of tasks still to come. A method that takes the whole stream at once is measured
    once, at the end. Where the plan asks for paths, accuracy is measured between
    the weights after a task and after the one before too; a finished run gets those that it still lacks.

    Args:
        plan: the plan.
        row: name of the row.
        seed: the seed: of the order, where the recipe says so, and of everything the learner draws.
        streams: gives the seed's stream.
        out: folder of the whole experiment.
        progress: called with a stage, the steps done and their number.
        measurement: what is measured; None for all that the recipe asks for.

    Returns:
        The finished record, as plain values.

    Raises:
        OptionError: an earlier run in the folder had other options.
        StoreError: the learner and its record do not fit together, or the folder cannot be written.
        LockedError: another process does the same.
    """
    with _alone_in(run_folder(out, row, seed)) as folder:
        stream = streams(seed)
        measurement = measurement or _measurement(plan, row, streams, out)
        record = _open_record(plan, row, seed, stream, folder, measurement)
        pairs = _wanted_pairs(plan, record)
        if record.is_complete and not pairs:
            return record.values
        stage = f"{record.values['label']}, seed {seed}"
        progress(stage, record.rows_done, len(stream.tasks))
        learner = _open_learner(plan, row, record)
        _note_the_start(plan, record, learner, num_classes=len(stream.tasks[0].labels))
        measurement.begin(learner, record, stream)
        work = _Work(learner, record, stream, measurement, _prefixed(progress, stage), saving=plan.saving)
        with open_trackers(plan, row, seed, learner=learner, out=out) as work.watch:
            _learn_and_measure(plan, work, pairs, lambda done: progress(stage, done, len(stream.tasks)), out)
        return record.values


@contextmanager
def _alone_in(folder: Path) -> Iterator[Path]:
    """Make a folder and keep other processes from writing to it, see `take_lock`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder)
    try:
        yield folder
    finally:
        lock.release()


def _learn_and_measure(plan: Plan, work: _Work, pairs: list[int], tell: Callable[[int], None], out: Path) -> None:
    learner, record, stream, row = work.learner, work.record, work.stream, work.record.values["method"]
    if (count := method_row(plan.recipe, row).own_texts) is not None:
        work.rehearse(count, out)
    if learner.trains_on == "stream":
        work.learn_whole()
        tell(len(stream.tasks))
    else:
        paths = _Paths(learner, record, stream, plan.path_points, pairs, work.progress)
        work.learn_in_turn(paths.measure, tell)


def _measurement(plan: Plan, row: str, streams: StreamSource, out: Path) -> Measurement:
    """What this recipe measures."""
    if stream_of(plan.recipe, plan.setting).scenario != "language":
        return ClassMeasurement()
    return LanguageMeasurement(
        retention=plan.setting.retention or plan.recipe.retention,
        samples=plan.setting.samples or plan.recipe.samples,
        general=streams.general(),
        answers=plan.recipe.answers,
        weights=method_row(plan.recipe, row).weights,
        folder=out,
    )


def _wanted_pairs(plan: Plan, record: RunRecord) -> list[int]:
    """First tasks of the paths that were asked for and are not measured yet."""
    if not plan.path_points or not has_path(record.values["registered_method"]):
        return []
    return [first for first in range(record.values["num_tasks"] - 1) if record.lacks_path(first, plan.path_points)]


def _open_record(plan: Plan, row: str, seed: int, stream: Stream, folder: Path, measurement: Measurement) -> RunRecord:
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
    fingerprints = [[task.train.fingerprint, rows_to_test(task).fingerprint] for task in stream.tasks]
    return RunRecord.open(
        folder / "run.json",
        identity=identity({**decisive, "fingerprints": fingerprints}),
        header=header,
        num_tasks=len(stream.tasks),
        empty=measurement.empty(len(stream.tasks)),
    )


def _note_the_start(plan: Plan, record: RunRecord, learner: Learner, *, num_classes: int) -> None:
    """Put in what later figures are compared with: the size, and if a claim asks for it the pretrained tensors."""
    if record.rows_done:
        return
    record.values["reference_parameters"] = reference_parameters(learner, num_classes)
    record.values["resolved"] = learner.settings.as_parts()
    record.values["recognition"] = record.values["resolved"]["method"].get("select")
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
            tests = [rows_to_test(task) for task in self.stream.tasks[: first + 2]]
            entry = measured_pair(self.learner, first, tests, self.points, progress=self.progress)
            if entry is None:
                self.pairs.clear()
                return
            self.record.keep_path(entry)


@dataclasses.dataclass
class _Work:
    """A learner, its stream and its record on the way through the tasks; `extra` tasks come before the stream's."""

    learner: Learner
    record: RunRecord
    stream: Stream
    measurement: Measurement
    progress: Progress
    extra: int = 0
    saving: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    watch: Trackers | None = None

    def rehearse(self, count: int, folder: Path) -> None:
        """Let texts of the pretrained model go by the method's memory before the first task.

        They are a task of their own, of one step that is too short to change a weight.

        Raises:
            OptionError: the method learns all tasks at once.
        """
        if self.learner.trains_on == "stream":
            raise OptionError(f"row '{self.record.values['method']}' learns all at once; leave own_texts out.")
        self.extra = 1
        if not self.learner.tasks:
            rows = own_texts(self.learner, count, folder)
            self._learn(rows, "own-texts", max_steps=1, lr=_NO_RATE)

    def learn_in_turn(self, after_each: Callable[[], None], tell: Callable[[int], None]) -> None:
        """Learn the tasks that are still to be learned, each followed by its measurement."""
        learner, record = self.learner, self.record
        ahead = len(learner.tasks) - self.extra - record.rows_done
        if ahead not in (0, 1):
            raise StoreError(
                f"{learner.path} holds {len(learner.tasks)} tasks and {record.path} {record.rows_done} measured ones; "
                "one of them was changed, so choose another folder with --out."
            )
        for index in range(record.rows_done, len(self.stream.tasks)):
            # A run killed between learning and measuring has the task already, and still has to measure it.
            if index == len(learner.tasks) - self.extra:
                task = self.stream.tasks[index]
                self._learn(task.train, task.name)
            self.measure(index, learned=index + self.extra)
            after_each()
            tell(index + 1)
        after_each()

    def learn_whole(self) -> None:
        """Learn all tasks at once, in as many steps as they would get one by one where their number is given."""
        tasks, steps = self.stream.tasks, self.learner.settings.training.max_steps
        if not self.learner.tasks:
            longer: dict[str, Any] = {} if steps is None else {"max_steps": steps * len(tasks)}
            rows = concatenate([task.train for task in tasks])
            self._learn(rows, "all-tasks", **longer)
        self.measure(len(tasks) - 1, learned=0)

    def _learn(self, rows: Examples, name: str, **training: Any) -> None:
        stop_if_asked()
        self.learner.learn(rows, name=name, progress=self.progress, watch=self.watch, **self.saving, **training)

    def measure(self, index: int, *, learned: int) -> None:
        """Fill row `index`; `learned` is the task of the learner whose cost and figures belong to it."""
        learner, values = self.learner, self.record.values
        self.measurement.measure(learner, self.record, self.stream, index)
        if self.watch is not None:
            self.watch.figures(moment_figures(values, [task.name for task in self.stream.tasks], index))
        kept = learner.card()["tasks"][learned]
        seconds = kept["cost"]["seconds"]
        cost = kept["cost"] | {"task": index, "seconds": seconds["total"], "parts": seconds}
        cost["state_bytes"] = bytes_on_disk(learner)
        if "digests" in values:
            values["digests"].append(tensor_digests(learner))
        panels = {name: self._renumbered(panel) for name, panel in kept["panels"].items()}
        self.record.append(cost=cost, panels=panels, task=index)

    def _renumbered(self, panel: dict[str, float]) -> dict[str, float]:
        """A panel whose tasks are counted as the stream counts them."""
        if not self.extra or not all(re.fullmatch(r"task \d+", name) for name in panel):
            return panel
        numbers = [int(name.split()[1]) - self.extra for name in panel]
        names = [f"task {number}" if number >= 0 else "own texts" for number in numbers]
        return dict(zip(names, panel.values(), strict=True))


def _prefixed(progress: Progress, stage: str) -> Progress:
    return lambda inner, done, total: progress(f"{stage}: {inner}", done, total)
