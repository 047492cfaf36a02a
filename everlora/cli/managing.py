"""`everlora status`, `everlora export` and `everlora rollback`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import completion, output
from everlora.cli.parameters import AsJson, BaseModel, Debug, Folder
from everlora.cli.progress import StageProgress

__all__ = ["export", "rollback", "status"]


def status(folder: Folder, *, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show what a learner has learnt, and what became of its older tasks."""
    from everlora.status import read_status

    report = read_status(folder)
    if as_json:
        output.emit_json(report)
    else:
        _print_status(folder, report)


def _print_status(folder: Path, report: Mapping[str, Any]) -> None:
    tasks, labels = report["tasks"], report["labels"]
    output.line(f"{folder}: {report['method']}, {report['scenario']}, model {report['model']}")
    for entry in report["forgotten"]:
        reason = f" ({entry['reason']})" if entry["reason"] else ""
        output.line(f"Forgotten on request, {entry['when']}: {output.kinds(entry['left'])}{reason}")
    if report["scenario"] == "language":
        _print_language(tasks)
        return
    output.line(
        f"{output.count(len(tasks), 'task')}, {output.count(len(labels), 'label')}: {output.listing(labels) or '-'}"
    )
    if not tasks:
        return
    output.table((*_COLUMNS, *_CLASS_COLUMNS), [(*_common_cells(task), *_class_cells(task)) for task in tasks])
    if report["accuracy_now"] is None:
        output.line(_NOTHING_KEPT)
    else:
        output.line(f"Mean accuracy now: {output.percent(report['accuracy_now'])} % on the rows kept back.")


def _print_language(tasks: Sequence[Mapping[str, Any]]) -> None:
    output.line(f"{output.count(len(tasks), 'task')}")
    if not tasks:
        return
    headings = (*_COLUMNS, "nats a token when learnt", "now")
    keys = ("cross_entropy_when_learned", "cross_entropy_now")
    figures = [[None if task.get(key) is None else f"{task[key]:.4f}" for key in keys] for task in tasks]
    rows = [(*_common_cells(task), *map(_or_dash, cells)) for task, cells in zip(tasks, figures, strict=True)]
    output.table(headings, rows)
    if all(task.get(keys[1]) is None for task in tasks):
        output.line(_NOTHING_KEPT)


_NOTHING_KEPT = "No rows were kept back to follow the tasks; 'init --keep-validation N' keeps some."
_COLUMNS = ("task", "name", "rows", "time")
_CLASS_COLUMNS = ("new labels", "known labels", "when learnt %", "now %", "change")


def _common_cells(task: Mapping[str, Any]) -> tuple[str, ...]:
    rows = _or_dash(task["num_examples"])
    return str(task["index"] + 1), task["name"], rows, output.duration(task.get("seconds"))


def _class_cells(task: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(len(task["new_labels"])),
        output.listing(task["known_labels"], most=4) or "-",
        output.percent(task.get("accuracy_when_learned")),
        output.percent(task.get("accuracy_now")),
        output.signed_percent(task.get("change")),
    )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty.")],
    *,
    model: BaseModel = None,
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="merged: a plain model of the base's kind; peft: an adapter folder for PEFT.",
            autocompletion=completion.formats,
        ),
    ] = "merged",
    task: Annotated[
        str | None,
        typer.Option("--task", help="Name of the task to export, where each has a network of its own."),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            "--max-rank", metavar="Q", min=1, help="Cut an adapter for PEFT to this rank; the error is shown."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Which weights, where a method keeps several; all for peft.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the learner as a model that other tools load."""
    with StageProgress():
        from everlora.learner import Learner

        learner = Learner.open(folder, model=model)
        given: dict[str, Any] = {"task": task, "max_rank": max_rank, "variant": variant}
        written = learner.export(target, format=layout, **{k: v for k, v in given.items() if v is not None})
    if as_json:
        output.emit_json({"format": layout, **output.plain(written)})
        return
    output.line(f"Wrote the {layout} model to {written.folder}; its README.md shows how to load it.")
    output.line(f"Largest difference of its logits from the learner's, on a few inputs: {written.max_difference:.1e}")
    if max_rank is not None and written.truncation:
        largest = max(written.truncation.values())
        output.line(
            f"Largest relative error of the {len(written.truncation)} layers cut to rank {max_rank}: {largest:.1e}"
        )


def rollback(
    folder: Folder,
    *,
    to_task: Annotated[int, typer.Option("--to-task", metavar="N", min=0, help="Keep the first N tasks.")],
    model: BaseModel = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go back to the learner as it was after its first N tasks; later ones move to the folder 'removed'."""
    from everlora.status import read_status

    with StageProgress():
        from everlora.learner import Learner

        removed = Learner.open(folder, model=model).rollback(to_task)
    report = read_status(folder)
    if as_json:
        output.emit_json(report)
        return
    output.line(f"{folder} is as it was after {output.count(len(report['tasks']), 'task')}.")
    if removed:
        names = output.listing([task.name for task in removed])
        output.line(f"Moved to {folder / 'removed'}: {names}")
