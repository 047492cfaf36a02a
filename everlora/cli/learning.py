"""`everlora init` and `everlora learn`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlora.cli import completion, output
from everlora.cli.parameters import (
    AsJson,
    BaseModel,
    CheckpointEvery,
    ColumnNames,
    Debug,
    DiscardUnfinished,
    Folder,
    ImageColumn,
    LabelColumn,
    Settings,
    TextColumn,
    columns_from,
    parse_settings,
)
from everlora.cli.progress import StageProgress

if TYPE_CHECKING:
    from everlora.learner import Learner
    from everlora.results import TaskResult

__all__ = ["init", "learn"]

logger = logging.getLogger("everlora.cli")

TaskSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a training option for this task only. Repeat for more."),
]


def init(
    folder: Folder,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SOURCE",
            help="Folder or hub id of the pretrained model, or 'packaged': the small vision transformer that comes "
            "with everlora, the default for images.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="How it learns; 'everlora methods' lists them and marks the default.",
            autocompletion=completion.methods,
        ),
    ] = None,
    scenario: Annotated[
        str,
        typer.Option(
            "--scenario",
            help="class_incremental, domain_incremental, task_incremental or language.",
            autocompletion=completion.scenarios,
        ),
    ] = "class_incremental",
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    task_column: Annotated[
        str | None,
        typer.Option("--task-column", metavar="NAME", help="Column that says which task or domain a row is of."),
    ] = None,
    column: ColumnNames = None,
    pooling: Annotated[
        str | None, typer.Option("--pooling", help="How tokens become one vector: auto, cls, mean, pooler or cls_mean.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Number format of the model: float32, bfloat16.")] = None,
    keep_validation: Annotated[
        int | None,
        typer.Option("--keep-validation", metavar="N", help="Keep N rows of each class back, for 'everlora eval'."),
    ] = None,
    keep_states: Annotated[
        str | None, typer.Option("--keep-states", help="newest, or all: go back to any task with 'everlora rollback'.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a learner: a folder that holds a pretrained model's name, a method and its options."""
    switches = {"pooling": pooling, "dtype": dtype, "keep_validation": keep_validation, "keep_states": keep_states}
    options = parse_settings(settings, model=model, method=method, seed=seed, **switches)
    columns = columns_from(column, text=text_column, image=image_column, label=label_column, task=task_column)
    from everlora.status import read_status

    with StageProgress():
        from everlora.learner import Learner
        from everlora.settings import usual_choice

        usual = {} if method is not None or scenario == "language" else usual_choice(options)
        Learner.create(folder, scenario=scenario, columns=columns, **options, **usual)
    report = read_status(folder)
    if as_json:
        output.emit_json(report)
        return
    output.line(f"Made a learner in {folder}: {report['method']}, {report['scenario']}, model {report['model']}.")
    if usual:
        _say_what_was_chosen(usual)
    output.line(f"Teach it with: everlora learn {folder} DATA")
    if not options.get("keep_validation"):
        output.line(
            "'everlora status' can follow old tasks only on rows kept back: --keep-validation N, here at 'init'."
        )


def _say_what_was_chosen(usual: Mapping[str, Any]) -> None:
    further = ", ".join(f"{key}={value}" for key, value in usual.items() if key != "method")
    why = "the best on average of what was measured over five streams" if further else "which has the options given"
    named = f"{usual['method']} with {further}" if further else usual["method"]
    output.line(f"No --method was given: {named}, {why}; 'everlora methods' lists the others.")


def learn(
    folder: Folder,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="CSV, JSON Lines or Parquet file, folder of these or of images (one folder a class), or hub id.",
        ),
    ],
    *,
    name: Annotated[str | None, typer.Option("--name", help="Name of the task; the data's name otherwise.")] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", metavar="DATA", help="Labelled rows to measure on, never learnt from.")
    ] = None,
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    column: ColumnNames = None,
    model: BaseModel = None,
    checkpoint_every: CheckpointEvery = None,
    discard_unfinished: DiscardUnfinished = False,
    settings: TaskSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Teach a learner the next task, from data whose labels may be new, known or mixed.

    Interrupted, by Ctrl-C for instance, the same command goes on where it was.
    """
    options = parse_settings(settings, checkpoint_every=checkpoint_every)
    if discard_unfinished:
        options["discard_unfinished"] = True
    columns = columns_from(column, text=text_column, image=image_column, label=label_column)
    with StageProgress() as progress:
        from everlora.learner import Learner
        from everlora.training import signals_ask

        learner = Learner.open(folder, model=model)
        given = {"name": name, "validation": validation, "columns": columns, "progress": progress, **options}
        with signals_ask():
            result = learner.learn(data, **given)
    if output.is_first():
        _warn_of_rows_learned_twice(learner)
    if as_json:
        output.emit_json(result)
        return
    _print_task(result)


def _warn_of_rows_learned_twice(learner: Learner) -> None:
    """Name the earlier task whose rows the newest one has, all of them and no other."""
    *earlier, newest = learner.card()["tasks"]
    same = [task["name"] for task in earlier if task.get("data_sha256", "") == newest["data_sha256"]]
    if same:
        logger.warning(
            "the rows of task '%s' are those of task '%s', which was learned already; if that was a mistake, "
            "take it back with: everlora rollback %s --to-task %d",
            newest["name"],
            same[0],
            shlex.quote(str(learner.path)),
            len(earlier),
        )


def _print_task(result: TaskResult) -> None:
    of_labels = f" of {len(result.labels)} labels" if result.labels else ""
    output.line(
        f"Task {result.index + 1} '{result.name}': learned {result.num_examples} rows{of_labels} "
        f"in {output.duration(result.seconds)} ({result.steps} steps)."
    )
    if not result.labels:
        if result.metrics:
            figures = [(task, f"{entropy:.4f}") for task, entropy in result.metrics.items()]
            output.table(("task", "nats a token"), figures, title="On the rows kept back")
        return
    output.line(f"New labels ({len(result.new_labels)}): {output.listing(result.new_labels) or 'none'}")
    if result.known_labels:
        output.line(f"Known labels ({len(result.known_labels)}): {output.listing(result.known_labels)}")
    if result.metrics:
        rows = [(task, output.percent(accuracy)) for task, accuracy in result.metrics.items()]
        output.table(("task", "accuracy %"), rows, title="On the rows kept back")
