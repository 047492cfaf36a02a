"""`everlora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import output
from everlora.cli.destinations import check_file
from everlora.cli.parameters import AsJson, Debug

__all__ = ["report"]

RESULTS, PLAN, LEARNER, PAGE = "results.json", "plan.json", "learner.json", "report.html"


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of a learner.")],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; report.html in a run's folder.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the HTML report of a run from its results, or a page on a learner; the page loads nothing."""
    results = _read(folder)
    kind = "run" if (folder / RESULTS).is_file() else "learner"
    # A learner's folder holds what the learner wrote, and nothing else.
    page = out or (folder / PAGE if kind == "run" else Path(f"{folder.resolve().name}-{PAGE}"))
    check_file(page)
    from everlora.report import write_report

    write_report(results, page)
    if as_json:
        output.emit_json({"report": str(page), "kind": kind, "bytes": page.stat().st_size})
        return
    output.line(f"Wrote {page}")


def _read(folder: Path) -> dict[str, Any]:
    from everlora.errors import DataError
    from everlora.experiments.records import read_json

    file = folder / RESULTS
    if file.is_file():
        return read_json(file)
    if (folder / LEARNER).is_file():
        from everlora.report import learner_results

        return learner_results(folder)
    if (folder / PLAN).is_file():
        raise DataError(f"{folder} holds a run that is not finished; give the same 'everlora run' again to finish it.")
    raise DataError(f"{folder} holds neither {RESULTS} nor a learner; give the folder of a run, or of a learner.")
