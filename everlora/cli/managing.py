"""`everlora status`, `everlora export` and `everlora rollback`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import completion, output
from everlora.cli.parameters import AsJson, BaseModel, Debug, Folder
from everlora.cli.progress import StageProgress

__all__ = ["export", "rollback", "status"]


def status(
    folder: Folder,
    *,
    every: Annotated[bool, typer.Option("--all", help="Show every task, however many there are.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a learner has learnt, and what became of its older tasks."""
    from everlora.status import read_status

    report = read_status(folder)
    if as_json:
        output.emit_json(report)
    else:
        _print_status(folder, report, every=every)


def _print_status(folder: Path, report: Mapping[str, Any], *, every: bool) -> None:
    tasks, labels = report["tasks"], report["labels"]
    is_language = report["scenario"] == "language"
    output.line(f"{folder}: {_recipe(report)}, {report['scenario']}, model {report['model']}")
    for entry in report["forgotten"]:
        reason = f" ({entry['reason']})" if entry["reason"] else ""
        output.line(f"Forgotten on request, {entry['when']}: {output.kinds(entry['left'])}{reason}")
    said = output.count(len(tasks), "task")
    if not is_language:
        said = f"{said}, {output.count(len(labels), 'label')}: "
        said += _fitting(labels, output.width() - len(said), most=12) or "-"
    output.line(said)
    if not tasks:
        return
    _print_tasks(tasks, every=every, is_language=is_language)
    if all(task["accuracy_now"] is None and task["cross_entropy_now"] is None for task in tasks):
        output.line(_NOTHING_KEPT)
    elif not is_language:
        output.line(f"Mean accuracy now: {output.percent(report['accuracy_now'])} % on the rows kept back.")


def _recipe(report: Mapping[str, Any]) -> str:
    """The method, and what else decides which answers it can give, where that is not the usual."""
    usual = {"head": ("head", "linear"), "model": ("feature_layers", 1)}
    chosen = []
    for part, (name, default) in usual.items():
        value = report["options"].get(part, {}).get(name, default)  # older learners have no such part or name
        chosen += [f"{name}={value}"] if value != default else []
    return f"{report['method']} with {' and '.join(chosen)}" if chosen else str(report["method"])


def _print_tasks(tasks: Sequence[Mapping[str, Any]], *, every: bool, is_language: bool) -> None:
    """One line for each task; of a long stream the first and the last ones, and one line for those between."""
    from everlora.status import together

    columns = _language_columns() if is_language else _class_columns(output.width())
    is_cut = not every and len(tasks) > _FIRST_SHOWN + _LAST_SHOWN + 1
    shown = [*tasks[:_FIRST_SHOWN], together(tasks[_FIRST_SHOWN:-_LAST_SHOWN]), *tasks[-_LAST_SHOWN:]]
    shown = shown if is_cut else list(tasks)
    numbers = f"{_FIRST_SHOWN + 1}-{len(tasks) - _LAST_SHOWN}"
    rows = [(*_which(task, numbers), *(cell(task) for cell in columns.values())) for task in shown]
    output.table(("task", "name", *columns), rows)
    if is_cut:
        whole = together(tasks)
        cost = f"{_or_dash(whole['num_examples'])} rows, {output.duration(whole['seconds'])}"
        output.line(f"All {len(tasks)} tasks: {cost}. {numbers} are one line; --all shows each.")


_NOTHING_KEPT = "No rows were kept back to follow the tasks; 'init --keep-validation N' keeps some."
_FIRST_SHOWN, _LAST_SHOWN = 3, 10
# from these widths of a line on there is room for names of known labels, of so many characters, and for all columns
_WIDE, _WIDER, _SHORT, _LONG = 110, 140, 24, 48
_Cell = Callable[[Mapping[str, Any]], str]
_COSTS: dict[str, _Cell] = {
    "rows": lambda task: _or_dash(task["num_examples"]),
    "time": lambda task: output.duration(task["seconds"]),
}


def _which(task: Mapping[str, Any], between: str) -> tuple[str, str]:
    return (str(task["index"] + 1), task["name"]) if "index" in task else (between, "between")


def _class_columns(width: int) -> dict[str, _Cell]:
    """What is said of a task of classes, by heading; in a narrow terminal only what stays on one line."""
    now: dict[str, _Cell] = {
        "now %": lambda task: output.percent(task["accuracy_now"]),
        "change": lambda task: output.signed_percent(task["change"]),
    }
    new, known = (lambda task: str(_number(task, "new_labels"))), (lambda task: str(_number(task, "known_labels")))
    if width < _WIDE:
        return {**_COSTS, "new": new, "known": known, **now}
    return {
        **_COSTS,
        "new labels": new,
        "known labels": lambda task: _known(task, _LONG if width >= _WIDER else _SHORT),
        "when learnt %": lambda task: output.percent(task["accuracy_when_learned"]),
        **now,
    }


def _language_columns() -> dict[str, _Cell]:
    return {
        **_COSTS,
        "nats a token when learnt": lambda task: _nats(task["cross_entropy_when_learned"]),
        "now": lambda task: _nats(task["cross_entropy_now"]),
    }


def _number(task: Mapping[str, Any], key: str) -> int:
    """How many labels; of several tasks, the sum."""
    return int(task[f"num_{key}"]) if f"num_{key}" in task else len(task[key])


def _known(task: Mapping[str, Any], room: int) -> str:
    number = _number(task, "known_labels")
    named = _fitting(task.get("known_labels", ()), room, most=4)
    return named if 0 < len(named) <= room else str(number) if number else "-"


def _fitting(names: Sequence[str], room: int, *, most: int) -> str:
    """As many names as fit, at least one."""
    texts = (output.listing(names, most=count) for count in range(most, 0, -1))
    return next((text for text in texts if len(text) <= room), output.listing(names, most=1))


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


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
