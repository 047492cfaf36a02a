"""`everlora doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlora.cli import output
from everlora.cli.parameters import AsJson, BaseModel, Debug, Folder

if TYPE_CHECKING:
    from everlora.doctor import Finding

__all__ = ["doctor"]


def doctor(
    folder: Folder,
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is broken or left over to the folder 'removed'.")
    ] = False,
    go_back: Annotated[
        bool,
        typer.Option("--go-back", help="With --repair: if tasks are damaged, go back to the newest ones that are not."),
    ] = False,
    model: BaseModel = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check every file of a learner, say what is wrong and how to mend it; exit code 1 when something is broken."""
    from everlora.doctor import examine

    if go_back and not repair:
        raise typer.BadParameter("it goes with --repair", param_hint="--go-back")
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
