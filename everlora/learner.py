"""`Learner`: a pretrained model that learns task after task and lives in a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everlora.adapters import adopt_at_start, with_full_path
from everlora.backbones import Backbone, load_backbone, model_fingerprint
from everlora.errors import DataError, OptionError, nearest
from everlora.evaluation import Evaluator
from everlora.export import ExportHead, ExportReport, choose_task, export_merged, export_peft, network_of
from everlora.kept_rows import KEPT_FILE, pack_rows, unpack_rows
from everlora.methods import DEFAULT, method_spec
from everlora.methods.base import Method, TaskInfo
from everlora.record import cost_record, load_base, provenance, task_name, task_record
from everlora.results import Counts, Evaluation, Prediction, TaskResult
from everlora.settings import Settings, check_scenario
from everlora.snapshot import join_state, split_state
from everlora.store import LearnerStore, TaskEntry
from everlora.streams import Columns, Examples, hold_out, load_examples
from everlora.training import Progress, TaskData, TaskTrainer, TrainingReport

__all__ = ["Learner"]


class Learner:
    """A pretrained model, a method and the tasks it has learned, in one directory.

    Use `Learner.create` or `Learner.open`. The directory is locked only while a task is learned or rolled back.

    Attributes:
        path: the directory.
        scenario: `class_incremental`, `domain_incremental` or `task_incremental`.
        settings: all options.
        classes: label names in the order of their class indices.
        backbone: the pretrained model with its input pipeline.
        method: the method, with what it remembers.
    """

    def __init__(
        self,
        store: LearnerStore,
        *,
        model: str | Path | None,
        device: str | None,
        loaded: tuple[Backbone, Method] | None = None,
    ) -> None:
        self.path = store.root
        self._store = store
        self._stale = False
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model_source = model
        self._load(store, loaded)

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str | Path = "packaged",
        method: str = DEFAULT,
        scenario: str = "class_incremental",
        columns: Mapping[str, str | None] | None = None,
        *,
        device: str | None = None,
        **options: Any,
    ) -> Learner:
        """Make a learner in a new directory.

        Args:
            path: a folder that holds no learner yet.
            model: local folder or hub id of a pretrained encoder; `"packaged"` is the small ViT that comes with
                everlora.
            method: name of a method; see `everlora methods`.
            scenario: `class_incremental`, `domain_incremental` or `task_incremental`.
            columns: names of the data's columns: `text` or `image`, `label`, `task`; found by type when left out.
            device: where to compute; a GPU when there is one.
            **options: options of the method, the training, the model and the learner, in one flat list.

        Raises:
            OptionError: an option is unknown or out of range.
            ModelError: the model cannot be loaded.
            StoreError: the folder holds a learner already.
        """
        settings = with_full_path(Settings.of(method, options))
        scenario = check_scenario(scenario)
        Columns.from_mapping(dict(columns or {}))
        backbone = load_backbone(model, **settings.as_parts()["model"])
        made = settings.method.method_class(settings.method_options, backbone, seed=settings.training.seed)
        header = {
            "base_model": str(Path(model).resolve()) if Path(model).is_dir() else str(model),
            "base_sha256": model_fingerprint(backbone.folder),
            "architecture": backbone.architecture,
            "modality": backbone.modality,
            "method": settings.method.name,
            "scenario": scenario,
            "columns": {key: value for key, value in (columns or {}).items() if value},
            "options": settings.as_parts(),
            **provenance(),
        }
        if settings.learner.start_from is not None:
            header["start_from_sha256"] = adopt_at_start(settings, made, backbone.model)
        with LearnerStore.create(path, header, keep_states=settings.learner.keep_states) as store:
            pass
        return cls(store, model=None, device=device, loaded=(backbone, made))

    @classmethod
    def open(cls, path: str | Path, model: str | Path | None = None, device: str | None = None) -> Learner:
        """Open a learner for prediction or further learning.

        Args:
            path: its directory.
            model: where the base model lies now, if it moved; its hash decides whether it is the same.
            device: where to compute; a GPU when there is one.

        Raises:
            StoreError: no learner there, or a file is missing, changed or from a newer version.
            ModelError: the base model is not found, or is not the one the learner was made with.
        """
        return cls(LearnerStore.open(path), model=model, device=device)

    @property
    def tasks(self) -> tuple[TaskEntry, ...]:
        """The learned tasks in order."""
        return self._store.tasks

    @property
    def model(self) -> nn.Module:
        """The pretrained model with the adapters in place."""
        return self.backbone.model

    @property
    def digest(self) -> str:
        """Sha256 over all that decides what the learner does next."""
        return self._store.digest

    @property
    def trains_on(self) -> str:
        """`task`, or `stream` for an upper bound that wants the rows of all tasks at once."""
        return self.method.trains_on

    def learn(
        self,
        dataset: Any,
        name: str | None = None,
        validation: Any = None,
        *,
        columns: Mapping[str, str | None] | None = None,
        progress: Progress | None = None,
        **training: Any,
    ) -> TaskResult:
        """Learn one more task and write it to the directory; on any failure the directory stays as it was.

        Args:
            dataset: a path, hub id, `datasets.Dataset`, list of dicts or `Examples`, with labels.
            name: of the task, which no earlier one has; the file's name, or `task-3`, by default.
            validation: labelled rows to keep with the task for `evaluate`; with the option `keep_validation` they are
                held out of `dataset` instead.
            columns: names of this data's columns, over those given to `create`.
            progress: called often as `progress(stage, done, total)`.
            **training: training options for this task only, such as `epochs`.

        Returns:
            What was learned and what it cost.

        Raises:
            DataError: the data cannot be used.
            NumericError: the loss is not finite.
            LockedError: another process is writing to the directory.
        """
        with LearnerStore.open(self.path, write=True) as store:
            if self._stale or store.digest != self._store.digest:
                self._load(store)
            settings = self.settings.with_training(training)
            if self.method.trains_on == "stream" and store.tasks:
                raise OptionError(
                    f"method '{self.settings.method.name}' learns all tasks at once and has learned; "
                    "make a new learner, or take a method that learns task after task."
                )
            examples = self._examples(dataset, columns)
            kept = None if validation is None else self._examples(validation, columns)
            if kept is None and self.settings.learner.keep_validation:
                keep = self.settings.learner.keep_validation
                examples, kept = hold_out(examples, fraction=0.5, seed=settings.training.seed, maximum=keep)
            chosen = task_name(name, dataset, [entry.name for entry in store.tasks])
            self._stale = True  # until the task is on disk, memory and disk differ
            result = self._learn(store, settings, chosen, examples, kept, progress)
            self._store, self._stale = store, False
        return result

    def predict(
        self, inputs: Any, task: str | int | None = None, *, progress: Progress | None = None
    ) -> list[Prediction]:
        """Classify inputs.

        Args:
            inputs: one text or a list of texts; for images, files, PIL images, uint8 arrays, or a data set.
            task: name or number of the task the inputs belong to, when it is known; only its classes compete.
            progress: called often as `progress(stage, done, total)`.

        Returns:
            One prediction per input.

        Raises:
            DataError: nothing was learned yet, or an input cannot be read.
        """
        self._require_tasks()
        return self._evaluator(progress).predict(self._inputs(inputs), self._task_index(task))

    def evaluate(
        self,
        dataset: Any = None,
        *,
        columns: Mapping[str, str | None] | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Measure accuracy on labelled rows, or on the rows kept back from every task.

        Args:
            dataset: labelled rows; None takes the kept ones.
            columns: names of this data's columns, over those given to `create`.
            progress: called often as `progress(stage, done, total)`.

        Raises:
            DataError: a label is unknown, or no rows were kept.
        """
        self._require_tasks()
        evaluator = self._evaluator(progress)
        if dataset is not None:
            return evaluator.evaluate(
                self._examples(dataset, columns), [entry.name for entry in self.tasks], self._labels
            )
        kept = {index: rows for index in range(len(self.tasks)) if (rows := self._kept_rows(index)) is not None}
        if not kept:
            raise DataError(
                f"{self.path} keeps no validation rows; give a data set, or create it with keep_validation."
            )
        counts = {self.tasks[index].name: self._count(evaluator, index, rows) for index, rows in kept.items()}
        return Evaluator.summary(counts)

    def evaluate_tasks(self, tasks: Sequence[tuple[int, Examples]]) -> list[Counts]:
        """Count correct rows of test sets.

        Args:
            tasks: number of the task each set belongs to, and its rows.
        """
        evaluator = self._evaluator()
        return [self._count(evaluator, index, rows) for index, rows in tasks]

    def export(
        self, path: str | Path, format: str = "merged", *, task: str | int | None = None, max_rank: int | None = None
    ) -> ExportReport:
        """Hand the model on to plain tools.

        Args:
            path: a new folder.
            format: `merged`, an ordinary model of the base's own kind, or `peft`, an adapter for the base.
            task: name or number of the task whose network is meant, where each task has one of its own; may be left
                out while there is one task.
            max_rank: of a `peft` adapter; layers of a higher total rank are cut to it, at the least error.

        Returns:
            What was written, the largest difference of its logits from the learner's on a few inputs, and the error
            of each layer that was cut.

        Raises:
            OptionError: unknown format or task, a task where all share one network or none where each has its own, or
                a rank that is not positive or not for this format.
            DataError: nothing was learned yet.
            UnsupportedError: the model or the method cannot be written in this form.
        """
        self._require_tasks()
        writers = {"merged": export_merged, "peft": export_peft}
        if format not in writers:
            raise OptionError(f"there is no export format '{format}'; {nearest(format, writers)}")
        options: dict[str, Any] = {}
        if max_rank is not None:
            if format != "peft":
                raise OptionError(f"max_rank is for format='peft', found '{format}', which has no rank; leave it out.")
            options["max_rank"] = max_rank
        names = [entry.name for entry in self.tasks]
        index = choose_task(self.method, names, None if task is None else self._task_index(task))
        card = self.card()
        if index is not None:
            card["tasks"] = [card["tasks"][index]]
        with network_of(self.method, index):
            rows = self.method.head_rows()
            labels = tuple(self.classes[c] for c in rows.classes)
            head = ExportHead(rows.weight.numpy(), rows.bias.numpy(), labels, normalize=rows.normalize)
            return writers[format](self.backbone, self.method.layers(), head, path, card=card, **options)

    def rollback(self, to_task: int) -> tuple[TaskEntry, ...]:
        """Go back to the moment after the first `to_task` tasks; later ones move to `removed/`.

        Returns:
            The tasks that were moved away.

        Raises:
            StoreError: there are fewer tasks, or the state at that point is no longer kept.
        """
        with LearnerStore.open(self.path, write=True) as store:
            dropped = store.rollback(to_task)
            self._load(store)
        return dropped

    def card(self) -> dict[str, Any]:
        """Lineage of the learner as plain values: base model, method, tasks with their labels and figures."""
        header = self._store.header
        tasks = [{"name": entry.name, **self._store.read_task(entry.index).record} for entry in self.tasks]
        return {**{key: header[key] for key in ("base_model", "base_sha256", "method", "scenario")}, "tasks": tasks}

    def __repr__(self) -> str:
        return (
            f"Learner({str(self.path)!r}, method={self.settings.method.name!r}, tasks={len(self.tasks)}, "
            f"classes={len(self.classes)})"
        )

    def _load(self, store: LearnerStore, loaded: tuple[Backbone, Method] | None = None) -> None:
        """Make model and method anew from what is on disk; `loaded` is a fresh pair, made with the same settings."""
        header = store.header
        self.scenario = header["scenario"]
        self.settings = Settings.from_parts(method_spec(header["method"]), header["options"])
        self.backbone, self.method = loaded or self._make(header)
        self.method.load_state(join_state(store))
        if loaded is None and not store.tasks:  # from the first task on, its state holds what was adopted
            adopt_at_start(self.settings, self.method, self.model, header)
        for module in (self.backbone, *self.method.own_modules()):
            module.to(self._device)
        records = [store.read_task(entry.index).record for entry in store.tasks]
        self._labels = [tuple(record["labels"]) for record in records]
        self.classes = list(dict.fromkeys(label for labels in self._labels for label in labels))
        self._label_kind = records[-1]["label_kind"] if records else None
        self._columns = Columns.from_mapping(header["columns"])
        self._kept: dict[int, Examples | None] = {}
        self._store, self._stale = store, False

    def _make(self, header: Mapping[str, Any]) -> tuple[Backbone, Method]:
        backbone = load_base(header, self._model_source, self.settings)
        settings = self.settings
        return backbone, settings.method.method_class(settings.method_options, backbone, seed=settings.training.seed)

    def _learn(
        self,
        store: LearnerStore,
        settings: Settings,
        name: str,
        examples: Examples,
        kept: Examples | None,
        progress: Progress | None,
    ) -> TaskResult:
        index = len(store.tasks)
        known = set(self.classes)
        labels = examples.classes
        self._label_kind = self._label_kind or examples.label_kind
        self.classes += [label for label in labels if label not in known]
        self._labels.append(labels)
        numbers = {label: number for number, label in enumerate(self.classes)}
        info = TaskInfo(index, name, tuple(numbers[label] for label in labels), len(examples))
        data = TaskData.of(self.backbone, examples, numbers)
        held = None if kept is None else TaskData.of(self.backbone, kept, numbers)
        report = TaskTrainer(self.backbone, self.method, settings.training, progress=progress).learn(info, data, held)
        self._kept[index] = kept
        metrics, evaluation = self._follow(index, name, progress)
        result = TaskResult(
            index=index,
            name=name,
            labels=labels,
            new_labels=tuple(label for label in labels if label not in known),
            known_labels=tuple(label for label in labels if label in known),
            num_examples=len(examples),
            num_validation=0 if kept is None else len(kept),
            seconds=report.seconds["total"],
            steps=report.steps,
            metrics=metrics,
            num_truncated=int(getattr(data.encoded, "num_truncated", 0)),
        )
        self._write(store, settings, result, examples, report, evaluation)
        return result

    def _follow(
        self, index: int, name: str, progress: Progress | None
    ) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
        """Accuracy on the kept rows of every task so far."""
        evaluator = self._evaluator(progress)
        metrics, evaluation = {}, {}
        names = [entry.name for entry in self.tasks] + [name]
        for task in range(index + 1):
            rows = self._kept_rows(task)
            if rows is not None and len(rows):
                counts = self._count(evaluator, task, rows)
                metrics[names[task]] = counts.accuracy
                evaluation[str(task)] = {"correct": counts.correct, "size": counts.size}
        return metrics, evaluation

    def _write(
        self,
        store: LearnerStore,
        settings: Settings,
        result: TaskResult,
        examples: Examples,
        report: TrainingReport,
        evaluation: Mapping[str, Mapping[str, int]],
    ) -> None:
        files = split_state(self.method.state(), result.index)
        kept = self._kept.get(result.index)
        if kept is not None:
            files.arrays[KEPT_FILE] = pack_rows(kept)
        outcome = {"values": files.values, "evaluation": evaluation, "panels": self.method.panels()}
        training = settings.as_parts()["training"]
        record = {**task_record(result, examples, training), **outcome, **cost_record(report, self.method)}
        record["environment"] = {"device": str(self.backbone.device), "threads": torch.get_num_threads()}
        store.write_task(
            result.name,
            record=record,
            arrays=files.arrays,
            documents=files.documents,
            state_arrays=files.state_arrays,
            state_values=files.state_values,
            log=report.log,
        )

    def _examples(self, dataset: Any, columns: Mapping[str, str | None] | None = None) -> Examples:
        named = {**self._store.header["columns"], **{key: value for key, value in (columns or {}).items() if value}}
        examples = load_examples(
            dataset,
            columns=Columns.from_mapping(named),
            modality=self.backbone.modality,
            image_size=self.backbone.image_size,
        )
        if self._label_kind not in (None, examples.label_kind) and not set(examples.classes) <= set(self.classes):
            raise DataError(
                f"the labels of this data are of kind '{examples.label_kind}' (such as '{examples.classes[0]}'), those "
                f"learned before of kind '{self._label_kind}' (such as '{self.classes[0]}'); use one naming for all."
            )
        return examples

    def _inputs(self, inputs: Any) -> Examples:
        options: dict[str, Any] = {
            "modality": self.backbone.modality,
            "require_labels": False,
            "image_size": self.backbone.image_size,
        }
        if isinstance(inputs, Examples):
            return inputs
        if isinstance(inputs, str | Path) or not isinstance(inputs, Sequence):
            inputs = [inputs]
        if inputs and isinstance(inputs[0], Mapping):
            return load_examples(list(inputs), columns=self._columns, **options)
        column = self.backbone.modality
        return load_examples(
            [{column: item} for item in inputs], columns=Columns.from_mapping({column: column}), **options
        )

    def _kept_rows(self, index: int) -> Examples | None:
        if index not in self._kept:
            task = self._store.read_task(index)
            self._kept[index] = unpack_rows(task.arrays(KEPT_FILE)) if KEPT_FILE in task.files else None
        return self._kept[index]

    def _count(self, evaluator: Evaluator, index: int, rows: Examples) -> Counts:
        learned = index < len(self._labels) and self.trains_on == "task"
        return evaluator.count(
            rows,
            self._labels[index] if learned else rows.classes,
            self._labels,
            task=index if learned else None,
            given=self.scenario == "task_incremental",
        )

    def _evaluator(self, progress: Progress | None = None) -> Evaluator:
        trainer = TaskTrainer(self.backbone, self.method, self.settings.training, progress=progress)
        return Evaluator(trainer, self.classes)

    def _task_index(self, task: str | int | None) -> int | None:
        names = [entry.name for entry in self.tasks]
        if task is None:
            if self.scenario == "task_incremental":
                raise OptionError(
                    "a task-incremental learner needs the task of the inputs; give task=, one of: " + ", ".join(names)
                )
            return None
        if isinstance(task, int) and 0 <= task < len(names):
            return task
        if str(task) not in names:
            raise OptionError(f"there is no task '{task}'; known: " + ", ".join(names))
        return names.index(str(task))

    def _require_tasks(self) -> None:
        if self._stale:
            self._load(LearnerStore.open(self.path))
        if not self.tasks:
            raise DataError(f"{self.path} has learned no task yet; call learn first.")
