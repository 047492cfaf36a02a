"""`Learner`: a pretrained model that learns task after task and lives in a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from everlora.adapters import adopt_at_start, with_full_path
from everlora.backbones import Backbone, load_backbone, model_fingerprint
from everlora.description import Describes
from everlora.errors import DataError, OptionError, nearest
from everlora.export import ExportReport, choose_task, network_of
from everlora.forgetting import Forgets
from everlora.kept_rows import KEPT_FILE, unpack_rows
from everlora.methods import DEFAULT, method_spec
from everlora.methods.base import Method, TaskInfo
from everlora.record import load_base, provenance, task_name, task_number, task_result, write_task
from everlora.rejection import Rejects
from everlora.restoring import restore_state
from everlora.results import Counts, Evaluation, LanguageEvaluation, LanguageScore, Prediction, TaskResult
from everlora.scenarios import LanguageScenario, Scenario, check_scenario, kind_of_model, make_scenario
from everlora.settings import Settings
from everlora.shared_directory import create_directory, exported, is_writer, reread, writing
from everlora.store import LearnerStore, TaskEntry
from everlora.streams import Examples
from everlora.training import Progress, TaskTrainer, Watcher, answering, device_of_process
from everlora.unfinished import Rows, TaskCheckpoints, open_checkpoints

__all__ = ["Learner"]


class Learner(Forgets, Describes, Rejects):
    """A pretrained model, a method and the tasks it has learned, in one directory.

    Use `Learner.create` or `Learner.open`. The directory is locked only while a task is learned or rolled back. Of
    several processes, which must all make the same calls, the first alone writes to it.

    Attributes:
        path: the directory.
        scenario: `class_incremental`, `domain_incremental`, `task_incremental` or `language`.
        settings: all options.
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
        self._device = device_of_process(device)
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
            scenario: `class_incremental`, `domain_incremental`, `task_incremental`, or `language` for a causal language
                model.
            columns: names of the data's columns: `text` or `image`, `label`, `task`; found by type when left out. For
                language, see `everlora.streams.load_dialogues`.
            device: where to compute; a GPU when there is one.
            **options: options of the method, the training, the model and the learner, in one flat list.

        Raises:
            OptionError: an option is unknown or out of range.
            ModelError: the model cannot be loaded.
            UnsupportedError: the method is not for models of this kind.
            StoreError: the folder holds a learner already.
        """
        settings = with_full_path(Settings.of(method, options))
        scenario, named = check_scenario(scenario), {key: value for key, value in (columns or {}).items() if value}
        backbone = load_backbone(model, kind=kind_of_model(scenario), **settings.as_parts()["model"])
        make_scenario(scenario, backbone=backbone, columns=named).check_method(settings.method)
        made = settings.make_method(backbone)
        header = {
            "base_model": str(Path(model).resolve()) if Path(model).is_dir() else str(model),
            "base_sha256": model_fingerprint(backbone.folder),
            "architecture": backbone.architecture,
            "modality": backbone.modality,
            "inputs_sha256": backbone.inputs_fingerprint,
            "method": settings.method.name,
            "scenario": scenario,
            "columns": named,
            "options": settings.as_parts(),
            **provenance(),
        }
        if (adopted := adopt_at_start(settings, made, backbone.model)) is not None:
            header["start_from_sha256"] = adopted
        place = device_of_process(device)
        store = create_directory(path, header, device=place, keep_states=settings.learner.keep_states)
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
        self._refresh()
        return self.backbone.model

    @property
    def digest(self) -> str:
        """Sha256 over all that decides what the learner does next."""
        return self._store.digest

    @property
    def classes(self) -> list[str]:
        """Label names in the order of their class indices."""
        self._refresh()
        return self._rules.classes

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the weights one may predict with, the usual ones first; empty where there is but one choice."""
        return self.method.variants

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
        watch: Watcher | None = None,
        discard_unfinished: bool = False,
        **training: Any,
    ) -> TaskResult:
        """Learn one more task, or go on with an interrupted one, and write it; a failure changes no learned task.

        Args:
            dataset: a path, hub id, `datasets.Dataset`, list of dicts or `Examples`, with labels.
            name: of the task, which no earlier one has; the file's name, or `task-3`, by default.
            validation: labelled rows to keep with the task for `evaluate`; with the option `keep_validation` they are
                held out of `dataset` instead.
            columns: names of this data's columns, over those given to `create`.
            progress: called often as `progress(stage, done, total)`.
            watch: told of every step and of the result, such as `everlora.tracking.Trackers`.
            discard_unfinished: put what is left of an interrupted task aside, in `removed/`, instead of going on.
            **training: training options for this task only, such as `epochs`, and `checkpoint_every`.

        Returns:
            What was learned and what it cost.

        Raises:
            DataError: the data cannot be used.
            NumericError: the loss is not finite.
            LockedError: another process is writing to the directory.
            OptionError: another task is unfinished.
            InterruptedLearning: somebody asked for a stop.
        """
        with writing(self.path, device=self._device) as store:
            if self._stale or store.digest != self._store.digest:
                self._load(store)
            settings = self.settings.with_training(training)
            if self.method.trains_on == "stream" and store.tasks:
                raise OptionError(
                    f"method '{self.settings.method.name}' learns all tasks at once and has learned; "
                    "make a new learner, or take a method that learns task after task."
                )
            examples = self._rules.load(dataset, columns)
            kept = None if validation is None else self._rules.load(validation, columns)
            if kept is None and (keep := self.settings.learner.keep_validation):
                examples, kept = self._rules.hold_out(examples, maximum=keep, seed=settings.training.seed)
            chosen = task_name(name, dataset, [entry.name for entry in store.tasks])
            rows = (examples, kept)
            checkpoints = open_checkpoints(
                store, settings, name=chosen, rows=rows, discard=discard_unfinished, device=self._device
            )
            try:
                result = self._learn(store, settings, chosen, rows, checkpoints, progress, watch)
            except BaseException:
                self._stale = True  # half a task is in memory, and nothing of it in a learned task on disk
                raise
            may_tell = is_writer(store, device=self._device)
        self._store = reread(store, device=self._device)
        if watch is not None and may_tell:
            watch.task(result)
        return result

    def predict(
        self,
        inputs: Any,
        task: str | int | None = None,
        *,
        variant: str | None = None,
        none_of_these: float | None = None,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """Classify inputs, or let a language model answer them.

        Args:
            inputs: one text or a list of texts; for images, files, PIL images, uint8 arrays, or a data set. For a
                language model prompts, or rows without answers.
            task: name or number of the task the inputs belong to, when it is known; only its classes compete.
            variant: which weights answer, of `variants`.
            none_of_these: share of rows of known classes, as in 0.05, that may get the label None so that rows of other
                classes get it, too; the threshold is taken from the kept rows (`keep_validation`) as they score now.
            progress: called often as `progress(stage, done, total)`.

        Returns:
            One prediction per input.

        Raises:
            DataError: nothing was learned yet, an input cannot be read, or too few rows were kept for a threshold.
            OptionError: no such task or variant, or none_of_these for a language model.
        """
        self._require_tasks()
        with self._predicting(variant):
            rows = self._rules.read_inputs(inputs)
            trainer, index = self._trainer(progress), self._task_index(task)
            return self._rules.predict(trainer, rows, index, self._rejection(none_of_these, trainer, index, variant))

    def generate(
        self, prompts: Sequence[Any], *, max_new_tokens: int | None = None, variant: str | None = None
    ) -> list[str]:
        """Let a language model go on from prompts, greedily; before the first task, too.

        Args:
            prompts: texts, or rows without answers; texts become prompts by the learner's template.
            max_new_tokens: how long the texts may be; the learner's option by default.
            variant: which weights write, of `variants`.

        Raises:
            OptionError: the learner is not one of language, or has no such variant.
        """
        if not isinstance(self._rules, LanguageScenario):
            raise OptionError(f"a learner of the scenario {self.scenario} writes no text; use predict.")
        self._refresh()
        with self._predicting(variant):
            return self._rules.generate(self._trainer(), prompts, max_new_tokens)

    def evaluate(
        self,
        dataset: Any = None,
        *,
        columns: Mapping[str, str | None] | None = None,
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> Evaluation | LanguageEvaluation:
        """Measure accuracy on labelled rows, or a language model on any rows, or on those kept back from every task.

        Args:
            dataset: the rows; None takes the kept ones.
            columns: names of this data's columns, over those given to `create`.
            variant: which weights are measured, of `variants`.
            progress: called often as `progress(stage, done, total)`.

        Raises:
            DataError: a label is unknown, or no rows were kept.
            OptionError: no such variant.
        """
        self._require_tasks()
        trainer = self._trainer(progress)
        names = [entry.name for entry in self.tasks]
        with self._predicting(variant):
            if dataset is not None:
                result: Evaluation | LanguageEvaluation = self._rules.evaluate(
                    trainer, self._rules.load(dataset, columns), names
                )
                return result
            kept = {i: rows for i in range(len(names)) if (rows := self._kept_rows(i)) is not None and len(rows)}
            if not kept:
                raise DataError(
                    f"{self.path} keeps no validation rows; give a data set, or create it with keep_validation."
                )
            scores = {names[index]: self._score(trainer, index, rows) for index, rows in kept.items()}
            summary: Evaluation | LanguageEvaluation = self._rules.summary(scores)
            return summary

    def evaluate_tasks(self, tasks: Sequence[tuple[int, Examples]], *, variant: str | None = None) -> list[Any]:
        """Measure on test sets; before the first task, too, where the model itself can answer.

        Args:
            tasks: number of the task each set belongs to, and its rows.
            variant: which weights are measured, of `variants`.

        Returns:
            `Counts`, or `LanguageScore` for a language model, one for each set.
        """
        self._refresh()
        trainer = self._trainer()
        with self._predicting(variant):
            return [self._score(trainer, index, rows) for index, rows in tasks]

    def export(
        self,
        path: str | Path,
        format: str = "merged",
        *,
        task: str | int | None = None,
        max_rank: int | None = None,
        variant: str | None = None,
    ) -> ExportReport:
        """Hand the model on to plain tools.

        Args:
            path: a new folder.
            format: `merged`, an ordinary model of the base's own kind, or `peft`, an adapter for the base.
            task: name or number of the task whose network is meant, where each task has one of its own; may be left
                out while there is one task.
            max_rank: of a `peft` adapter; layers of a higher total rank are cut to it, at the least error.
            variant: which weights, of `variants`. By default those that predict are merged, and a `peft` export has a
                sub-folder for each.

        Returns:
            What was written, the largest difference of its logits from the learner's on a few inputs, and the error
            of each layer that was cut.

        Raises:
            OptionError: unknown format, task or variant, a task where all share one network or none where each has
                its own, or a rank that is not positive or not for this format.
            DataError: nothing was learned yet.
            UnsupportedError: the model or the method cannot be written in this form.
        """
        self._require_tasks()
        formats = ("merged", "peft")
        if format not in formats:
            raise OptionError(f"there is no export format '{format}'; {nearest(format, formats)}")
        if max_rank is not None and format != "peft":
            raise OptionError(f"max_rank is for format='peft', found '{format}', which has no rank; leave it out.")
        self._check_variant(variant)
        names = [entry.name for entry in self.tasks]
        index = choose_task(self.method, names, None if task is None else self._task_index(task))
        card = self.card()
        if index is not None:
            card["tasks"] = [card["tasks"][index]]
        with network_of(self.method, index):
            given: dict[str, Any] = {"format": format, "card": card, "max_rank": max_rank, "variant": variant}
            return exported(lambda: self._rules.export(self.method, path, **given), device=self._device)

    def rollback(self, to_task: int) -> tuple[TaskEntry, ...]:
        """Go back to the moment after the first `to_task` tasks; later ones move to `removed/`.

        Returns:
            The tasks that were moved away.

        Raises:
            StoreError: there are fewer tasks, or the state at that point is no longer kept.
        """
        with writing(self.path, device=self._device) as store:
            dropped = store.rollback(to_task) if store.is_writable else store.tasks[to_task:]
        self._load(reread(store, device=self._device))
        return dropped

    def _load(self, store: LearnerStore, loaded: tuple[Backbone, Method] | None = None) -> None:
        """Make model and method anew from what is on disk; `loaded` is a fresh pair, made with the same settings."""
        header = store.header
        self.scenario = header["scenario"]
        self.settings = Settings.from_parts(method_spec(header["method"]), header["options"])
        self.backbone, self.method = loaded or self._make(header)
        restore_state(self.method, store)
        if loaded is None and not store.tasks:  # from the first task on, its state holds what was adopted
            adopt_at_start(self.settings, self.method, self.backbone.model, header)
        for module in (self.backbone, *self.method.own_modules()):
            module.to(self._device)
        records = [store.read_task(entry.index).record for entry in store.tasks]
        self._rules: Scenario[Any, Any] = make_scenario(
            self.scenario, backbone=self.backbone, columns=header["columns"]
        )
        self._rules.restore(records)
        if isinstance(self._rules, LanguageScenario):
            self._rules.max_new_tokens = self.settings.learner.max_new_tokens
        self._kept: dict[int, Examples | None] = {}
        self._store, self._stale = store, False

    def _make(self, header: Mapping[str, Any]) -> tuple[Backbone, Method]:
        backbone = load_base(header, self._model_source, self.settings)
        return backbone, self.settings.make_method(backbone)

    @answering()
    def _learn(
        self,
        store: LearnerStore,
        settings: Settings,
        name: str,
        rows: Rows,
        checkpoints: TaskCheckpoints,
        progress: Progress | None,
        watch: Watcher | None,
    ) -> TaskResult:
        (examples, kept), index = rows, len(store.tasks)
        known = set(self.classes)
        labels = self._rules.add_task(examples)
        classes = tuple(self.classes.index(label) for label in labels)
        data = self._rules.encode(examples)
        held = self._rules.encode(kept) if kept is not None and len(kept) else None
        info = TaskInfo(index, name, classes, len(data))
        trainer = TaskTrainer(self.backbone, self.method, settings.training, progress=progress, checkpoints=checkpoints)
        trainer.watch = watch
        report = trainer.learn(info, data, held)
        self._kept[index] = kept
        metrics, evaluation = self._follow(index, name, progress)
        result = task_result(info, labels, known, data, kept, report=report, metrics=metrics)
        if is_writer(store, device=self._device):
            outcome = {"evaluation": evaluation, "data_sha256": examples.fingerprint, "label_kind": examples.label_kind}
            write_task(store, self.method, settings, result, report, kept=kept, outcome=outcome)
        return result

    def _follow(
        self, index: int, name: str, progress: Progress | None
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Figures on the kept rows of every task so far, and what they are made of."""
        trainer = self._trainer(progress)
        metrics, evaluation = {}, {}
        names = [entry.name for entry in self.tasks] + [name]
        with self._predicting(None):
            for task in range(index + 1):
                rows = self._kept_rows(task)
                if rows is not None and len(rows):
                    score = self._score(trainer, task, rows)
                    metrics[names[task]] = self._rules.figure(score)
                    evaluation[str(task)] = self._rules.plain(score)
        return metrics, evaluation

    def _kept_rows(self, index: int) -> Examples | None:
        if index not in self._kept:
            task = self._store.read_task(index)
            self._kept[index] = unpack_rows(task.arrays(KEPT_FILE)) if KEPT_FILE in task.files else None
        return self._kept[index]

    def _score(self, trainer: TaskTrainer, index: int, rows: Examples) -> Counts | LanguageScore:
        learned = index < len(self._rules.labels) and self.trains_on == "task"
        score: Counts | LanguageScore = self._rules.score(trainer, rows, index if learned else None)
        return score

    def _trainer(self, progress: Progress | None = None) -> TaskTrainer:
        return TaskTrainer(self.backbone, self.method, self.settings.training, progress=progress)

    def _predicting(self, variant: str | None) -> AbstractContextManager[None]:
        self._check_variant(variant)
        return self.method.predicting(variant)

    def _check_variant(self, variant: str | None) -> None:
        if variant is not None and variant not in self.variants:
            known = nearest(variant, self.variants) if self.variants else "it has none; leave variant out."
            raise OptionError(f"the learner has no variant '{variant}'; {known}")

    def _task_index(self, task: str | int | None) -> int | None:
        return task_number(task, [entry.name for entry in self.tasks], needed=self.scenario == "task_incremental")

    def _refresh(self) -> None:
        """Go back to what is on disk after a task that could not be learned to its end."""
        if self._stale:
            self._load(LearnerStore.open(self.path))

    def _require_tasks(self) -> None:
        self._refresh()
        if not self.tasks:
            raise DataError(f"{self.path} has learned no task yet; call learn first.")
