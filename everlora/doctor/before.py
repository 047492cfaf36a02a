"""What can be said before training: of a learner and the data files that come next, or of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from everlora.backbones import Backbone, load_backbone
from everlora.doctor.coming import ComingTask, Outlook, parts_of
from everlora.doctor.cost import estimate, how_it_was_made
from everlora.doctor.data_checks import check_balance, check_spelling, check_texts
from everlora.doctor.dry_run import Measured, dry_run, sample_of
from everlora.doctor.environment import check_environment
from everlora.doctor.findings import Finding, Severity, broken, warning
from everlora.doctor.layer_checks import check_targets, check_width, told_of
from everlora.doctor.leaks import check_leaks, check_repeats
from everlora.doctor.lengths import check_lengths, encoder_silent
from everlora.errors import DataError, EverloraError
from everlora.experiments.plan import Plan, Streams, make_plan, method_row, row_options
from everlora.experiments.recipe import recipe_text, stream_of
from everlora.kept_rows import KEPT_FILE, unpack_rows
from everlora.learner import Learner
from everlora.methods.base import Method, TaskInfo
from everlora.scenarios import Scenario, kind_of_model, make_scenario
from everlora.settings import Settings
from everlora.store import LearnerStore
from everlora.streams import Examples, concatenate
from everlora.training import Progress, TaskData
from everlora.training.processes import device_of_process

__all__ = ["examine_data", "examine_recipe"]

_ORDER: tuple[Severity, ...] = ("broken", "warning", "note")


def examine_data(
    path: str | Path,
    data: Sequence[Any],
    *,
    columns: Mapping[str, str] | None = None,
    model: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Outlook:
    """Look at data sets that a learner is to be taught next, in this order; nothing on disk changes.

    Args:
        path: directory of the learner.
        data: files, or whatever `Learner.learn` takes.
        columns: names of their columns, over those given to `create`.
        model: where the base model lies now, if it moved.
        device: where to compute; a GPU when there is one.
        progress: called as `progress(stage, done, total)`.

    Raises:
        StoreError: there is no learner, or it is damaged.
        ModelError: the base model is not found, or is another one.
    """
    learner = Learner.open(path, model=model, device=device)
    store = LearnerStore.open(path)
    rules = make_scenario(learner.scenario, backbone=learner.backbone, columns=store.header["columns"])
    outlook, records = Outlook(), learner.card()["tasks"]
    rules.restore(records)
    known, learned_before = list(rules.classes), {record.get("data_sha256"): record["name"] for record in records}
    coming: list[ComingTask] = []
    for number, dataset in enumerate(data):
        (progress or _silent)("read data", number, len(data))
        name = Path(dataset).name if isinstance(dataset, str | Path) else f"data set {number + 1}"
        try:
            task = _load(learner, rules, name, dataset, columns)
        except EverloraError as error:
            outlook.findings.append(told_of(name, error))
            continue
        coming.append(task)
        if task.train is not None and task.train.fingerprint in learned_before:
            what = f"is what was learned already as task '{learned_before[task.train.fingerprint]}'"
            outlook.findings.append(warning(name, what, "leave it out, unless it is to be learned twice"))
    earlier = [
        ComingTask(f"task '{entry.name}'", None, unpack_rows(kept.arrays(KEPT_FILE)))
        for entry in learner.tasks
        if KEPT_FILE in (kept := store.read_task(entry.index)).files
    ]
    outlook.findings += _data_findings([*earlier, *coming], coming, known, learner.backbone)
    if coming:
        _classes_in_turn(rules, records, coming)
        row = learner.settings.method.name
        _try_out(outlook, row, learner.settings, learner.backbone, learner.method, rules, coming, len(records))
    return _sorted(outlook)


def examine_recipe(
    recipe: str | Path,
    *,
    methods: Sequence[str] | None = None,
    setting: str | None = None,
    data: Any = None,
    model: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Outlook:
    """Look at the data of a recipe and try out its rows on the first task; nothing on disk changes.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        methods: rows to try; None takes the recipe's default rows.
        setting: which of the recipe's settings; None takes its default.
        data: data that replaces the recipe's.
        model: base model that replaces the recipe's.
        options: options for every row whose method knows them.
        device: where to compute; a GPU when there is one.
        progress: called as `progress(stage, done, total)`.

    Raises:
        OptionError: an unknown recipe, setting, row or option.
        ModelError: no base model can be found.
    """
    plan = make_plan(
        recipe_text(recipe),
        file=Path(recipe).name,
        setting=setting,
        methods=methods,
        model=model,
        data=data,
        options=options,
    )
    outlook, seed = Outlook(), plan.seeds[0]
    try:
        stream = Streams(plan, progress)(seed)
    except DataError as error:
        outlook.findings = [*check_environment(), told_of("the data", error)]
        return _sorted(outlook)
    tasks = [ComingTask(task.name, task.train, task.validation, task.test) for task in stream.tasks]
    scenario = stream_of(plan.recipe, plan.setting).scenario
    for number, row in enumerate(plan.rows):
        (progress or _silent)("try out rows", number, len(plan.rows))
        settings = Settings.of(method_row(plan.recipe, row).method, row_options(plan, row, seed, len(tasks)))
        backbone = _load_backbone(plan, settings, scenario)
        if not number:
            outlook.findings += _data_findings(tasks, tasks, [], backbone)
        method = _make_method(outlook, row, settings, scenario, backbone, device=device)
        if method is not None:
            rules = make_scenario(scenario, backbone=backbone, columns={})
            _classes_in_turn(rules, [], tasks)
            _try_out(outlook, row, settings, backbone, method, rules, tasks, 0)
    return _sorted(outlook)


def _load(
    learner: Learner, rules: Scenario[Any, Any], name: str, dataset: Any, columns: Mapping[str, str] | None
) -> ComingTask:
    """Read rows, and hold out those that the learner would keep."""
    rows, kept = rules.load(dataset, columns), None
    if keep := learner.settings.learner.keep_validation:
        rows, kept = rules.hold_out(rows, maximum=keep, seed=learner.settings.training.seed)
    return ComingTask(name, rows, kept)


def _data_findings(
    everything: list[ComingTask], coming: list[ComingTask], known: Sequence[str], backbone: Backbone
) -> Iterator[Finding]:
    yield from check_environment()
    for part in parts_of(coming):
        yield from check_texts(part)
        yield from check_lengths(part, backbone)
        if part.split == "training":
            yield from check_repeats(part)
    for task in coming:
        yield from check_balance(task)
    yield from check_spelling(coming, known)
    yield from check_leaks(everything)


def _load_backbone(plan: Plan, settings: Settings, scenario: str) -> Backbone:
    return load_backbone(plan.model, kind=kind_of_model(scenario), **settings.as_parts()["model"])


def _make_method(
    outlook: Outlook, row: str, settings: Settings, scenario: str, backbone: Backbone, *, device: str | None
) -> Method | None:
    """Attach a method to a network; None where that fails, which is then a finding."""
    try:
        make_scenario(scenario, backbone=backbone, columns={}).check_method(settings.method)
        method = settings.method.method_class(settings.method_options, backbone, seed=settings.training.seed)
    except EverloraError as error:
        options = settings.method_options
        reasons = [*check_targets(row, options, backbone.model), *check_width(row, options, backbone)]
        outlook.findings += reasons or [told_of(row, error)]
        return None
    for module in (backbone, *method.own_modules()):
        module.to(device_of_process(device))
    return method


def _classes_in_turn(
    rules: Scenario[Any, Any], records: Sequence[Mapping[str, Any]], coming: Sequence[ComingTask]
) -> None:
    """Number the classes of the tasks as learning one after another does."""
    rules.restore(records)
    for task in coming:
        if task.train is not None:
            rules.add_task(task.train)


def _try_out(
    outlook: Outlook,
    row: str,
    settings: Settings,
    backbone: Backbone,
    method: Method,
    rules: Scenario[Any, Any],
    coming: Sequence[ComingTask],
    index: int,
) -> None:
    """Make a dry run on one task, and say what every task will cost."""
    tasks = [(task.name, task.train) for task in coming if task.train is not None]
    if method.trains_on == "stream":
        tasks = [("all tasks", concatenate([rows for _, rows in tasks]))]
    measured: Measured | None = None
    # A task of one class is the one that a head trained on it alone cannot learn, so it is tried first.
    alone = [entry for entry in tasks if len(entry[1].classes) == 1][:1]
    for name, examples in dict([*alone, tasks[0]]).items():
        try:
            sample = sample_of(examples, batch_size=settings.training.batch_size)
            with encoder_silent():
                data = rules.encode(sample)
            classes = tuple(rules.classes.index(label) for label in examples.classes)
            info = TaskInfo(index, name, classes, len(data))
            measured = dry_run(row, settings, backbone, method, info, data)
        except EverloraError as error:
            outlook.findings.append(told_of(f"{row}, {name}", error))
            continue
        except torch.OutOfMemoryError:
            mend = "set batch_size lower, or micro_batches higher"
            outlook.findings.append(broken(row, "does not fit into the device's memory", mend))
            return
        break
    if measured is None:
        return
    outlook.findings += measured.findings
    batch, device = settings.training.batch_size, str(backbone.device.type)
    outlook.how.append(how_it_was_made(row, name, measured, device=device, batch_size=batch))
    for name, examples in tasks:
        count, width = _size(rules, backbone, examples, measured)
        outlook.estimates.append(estimate(row, name, measured, settings.training, rows=count, width=width))


def _size(rules: Scenario[Any, Any], backbone: Backbone, examples: Examples, measured: Measured) -> tuple[int, float]:
    """Rows as they are encoded, and their mean length."""
    if examples.modality == "image":
        return len(examples), 1.0
    with encoder_silent():
        data: TaskData = rules.encode(examples)
    lengths = backbone.lengths(data.encoded)
    return len(data), measured.width if lengths is None or not len(lengths) else float(lengths.mean())


def _sorted(outlook: Outlook) -> Outlook:
    outlook.findings.sort(key=lambda one: _ORDER.index(one.severity))
    return outlook


def _silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""
