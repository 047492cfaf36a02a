"""`everlora forget`."""

from __future__ import annotations

from typing import Annotated

import typer

from everlora.cli import output
from everlora.cli.parameters import AsJson, BaseModel, Debug, Folder
from everlora.cli.progress import StageProgress

__all__ = ["forget"]


def forget(
    folder: Folder,
    *,
    label: Annotated[str | None, typer.Option("--label", metavar="NAME", help="Rows of this class.")] = None,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="TEXT", help="Rows that contain this text; or COLUMN=VALUE, such as id=42."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="Rows that were learnt with this task.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="DATA", help="Whatever equals a row of this data set.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="For the record, which is kept: do not repeat in it what must go.")
    ] = None,
    model: BaseModel = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Let rows, and statistics of whole classes, leave a learner's folder for good; what was trained stays."""
    if label is None and where is None and task is None and rows is None:
        raise typer.BadParameter("give one of them or several: rows must meet all", param_hint="--label/--where/--task")
    with StageProgress():
        from everlora.learner import Learner

        learner = Learner.open(folder, model=model)
        done = learner.forget(label=label, where=where, task=task, rows=rows, reason=reason)
    if as_json:
        output.emit_json(done)
        return
    if done.left:
        output.line(f"Left {folder}: {output.kinds(done.left)}.")
    else:
        output.line(f"Nothing of the kind was found in {folder}; nothing was changed.")
    for sentence in done.remaining:
        output.line(f"- {sentence}")
