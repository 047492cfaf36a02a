"""`everlora doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlora.cli import output
from everlora.cli.parameters import (
    AsJson,
    BaseModel,
    ColumnNames,
    Debug,
    ImageColumn,
    LabelColumn,
    Settings,
    TextColumn,
    columns_from,
    parse_settings,
    split_names,
)
from everlora.cli.progress import StageProgress

if TYPE_CHECKING:
    from everlora.doctor import Finding
    from everlora.doctor.coming import Outlook

__all__ = ["doctor"]


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="The learner's folder.", show_default=False)
    ] = None,
    coming: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA]...", help="Data that it is to learn next, in order.", show_default=False),
    ] = None,
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is broken or left over to the folder 'removed'.")
    ] = False,
    go_back: Annotated[
        bool,
        typer.Option("--go-back", help="With --repair: if tasks are damaged, go back to the newest ones that are not."),
    ] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="RECIPE", help="Look at a recipe instead of a learner.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="With --recipe: rows to try; its own otherwise.")
    ] = None,
    setting: Annotated[
        str | None, typer.Option("--setting", metavar="NAME", help="With --recipe: which of its settings.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="With --recipe: where its data lies.")
    ] = None,
    settings: Settings = None,
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    column: ColumnNames = None,
    model: BaseModel = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the files of a learner; with DATA, or --recipe, say before training what will go wrong and what it costs.

    Nothing is changed without --repair. Exit code 1 when something is broken, 0 with warnings only.
    """
    if go_back and not repair:
        raise typer.BadParameter("it goes with --repair", param_hint="--go-back")
    if (folder is None) == (recipe is None):
        raise typer.BadParameter("give either a learner's folder or --recipe", param_hint="DIR")
    if repair and (recipe is not None or coming):
        raise typer.BadParameter("it is for a learner's folder alone", param_hint="--repair")
    if recipe is None and (methods or setting or data or settings):
        raise typer.BadParameter("--methods, --setting, --data and --set go with it", param_hint="--recipe")
    if recipe is not None:
        given = {"setting": setting, "data": data, "model": model, "options": parse_settings(settings) or None}
        _show_outlook(_look_at_recipe(recipe, methods=split_names(methods), **given), recipe, as_json=as_json)
        return
    assert folder is not None
    columns = columns_from(column, text=text_column, image=image_column, label=label_column)
    if coming:
        _look_ahead(folder, coming, columns=columns, model=model, as_json=as_json)
    else:
        _look_at_files(folder, repair=repair, go_back=go_back, model=model, as_json=as_json)


def _look_at_files(folder: Path, *, repair: bool, go_back: bool, model: str | None, as_json: bool) -> None:
    from everlora.doctor import examine

    report: dict[str, Any] = {"folder": str(folder), "moved": [], "kept_tasks": None}
    if repair:
        findings = _repair(folder, report, model=model, go_back=go_back, may_ask=not as_json)
    else:
        findings = examine(folder, model=model)
    is_broken = any(finding.severity == "broken" for finding in findings)
    if as_json:
        output.emit_json({**report, "ok": not is_broken, "findings": findings})
    else:
        _print(folder, findings, is_broken=is_broken)
    if is_broken:
        raise typer.Exit(1)


def _look_at_recipe(recipe: str, **given: Any) -> Outlook:
    with StageProgress() as progress:
        from everlora.doctor import examine_recipe

        return examine_recipe(recipe, progress=progress, **given)


def _look_ahead(folder: Path, coming: list[str], *, columns: Any, model: str | None, as_json: bool) -> None:
    """The files first: with a damaged learner nothing can be tried out."""
    from everlora.doctor import examine

    findings = [one for one in examine(folder, model=model, base=False) if one.severity != "note"]
    if any(one.severity == "broken" for one in findings):
        _look_at_files(folder, repair=False, go_back=False, model=model, as_json=as_json)
        return
    with StageProgress() as progress:
        from everlora.doctor import examine_data

        outlook = examine_data(folder, coming, columns=columns, model=model, progress=progress)
    outlook.findings += findings
    _show_outlook(outlook, str(folder), as_json=as_json)


def _show_outlook(outlook: Outlook, subject: str, *, as_json: bool) -> None:
    if as_json:
        output.emit_json({"subject": subject, "ok": not outlook.is_broken, **vars(outlook)})
    else:
        _print_estimates(outlook)
        for finding in outlook.findings:
            output.line(str(finding))
        if not outlook.findings:
            output.line("Nothing was found that stands in the way.")
        elif not outlook.is_broken:
            output.line("Nothing is broken.")
    if outlook.is_broken:
        raise typer.Exit(1)


def _print_estimates(outlook: Outlook) -> None:
    if not outlook.estimates:
        return
    rows = [
        (
            one.row,
            one.task,
            str(one.rows),
            str(one.steps),
            output.duration(one.seconds),
            f"{one.peak_memory_bytes / 2**20:.0f}",
            str(one.parameters),
        )
        for one in outlook.estimates
    ]
    columns = ("method", "task", "rows", "steps", "about", "peak MiB", "trained parameters")
    output.table(columns, rows, title="What each task will cost, estimated from a few steps")
    for line in outlook.how:
        output.line(line)
    total = sum(one.seconds for one in outlook.estimates)
    if len(outlook.estimates) > 1:
        output.line(f"All of it: about {output.duration(total)}.")


def _repair(folder: Path, report: dict[str, Any], *, model: str | None, go_back: bool, may_ask: bool) -> list[Finding]:
    from everlora.doctor import repair, way_back

    number = way_back(folder)
    if number is not None and not go_back and may_ask and sys.stdin.isatty():
        question = f"{folder} is damaged. Go back to its first {output.count(number, 'task')}, moving later ones aside?"
        go_back = typer.confirm(question)
    done = repair(folder, go_back=go_back, model=model)
    report.update(moved=list(done.moved), kept_tasks=done.kept_tasks)
    if may_ask:
        for path in done.moved:
            output.line(f"moved to {folder / 'removed'}: {path}")
        if done.kept_tasks is not None:
            output.line(f"{folder} is as it was after {output.count(done.kept_tasks, 'task')}.")
    return done.findings


def _print(folder: Path, findings: list[Finding], *, is_broken: bool) -> None:
    for finding in findings:
        output.line(str(finding))
    if not is_broken:
        output.line(f"{folder} is whole: every file is the one that was written.")
