"""`everlora compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everlora.cli import output
from everlora.cli.destinations import check_file
from everlora.cli.parameters import AsJson, Debug, split_names

if TYPE_CHECKING:
    from everlora.comparison import Comparison

__all__ = ["compare"]


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that 'everlora run' wrote.")],
    *,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="ROW", help="Row that the others are tested against; the first otherwise."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="A,B", help="Numbers to show, such as last,avg_samples,forgetting,sec_task."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option("--sort", metavar="NUMBER", help="Best rows first, by this number.")
    ] = None,
    printed_as: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="PROJECT",
            help="What another project would print: pilot, libcontinual, mammoth, avalanche, trace, inflora, sdlora or "
            "easycl.",
        ),
    ] = None,
    test: Annotated[str, typer.Option("--test", metavar="NAME", help="Paired test over seeds: t or wilcoxon.")] = "t",
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="markdown, latex, csv, json or html; by the suffix of --out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write a .md, .tex, .csv, .json or .html file.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Set runs side by side: means over seeds, paired tests, what others print, what others published."""
    from everlora.comparison import compare as compare_runs

    wanted = _format(form, out)
    if out is not None:
        check_file(out)
    found = compare_runs(
        folders,
        baseline=baseline,
        metrics=split_names(metrics),
        sort=sort,
        printed_as=printed_as,
        test=test,  # type: ignore[arg-type]  # another word is refused there, with the words that are known
    )
    if out is not None:
        found.write(out, wanted)  # type: ignore[arg-type]  # as above
    if as_json:
        output.emit_json(found.to_json())
    elif out is not None:
        output.line(f"Wrote {out}")
    elif wanted is not None:
        output.line(found.render(wanted).rstrip("\n"))  # type: ignore[arg-type]  # as above
    else:
        _show(found)


def _format(form: str | None, out: Path | None) -> str | None:
    """The format that was asked for, checked before anything is read."""
    from everlora.comparison import FORMATS, format_of
    from everlora.errors import OptionError, nearest

    if form is not None and form not in FORMATS:
        raise OptionError(f"there is no format '{form}'; {nearest(form, FORMATS)}")
    return form if form is not None or out is None else format_of(out)


def _show(found: Comparison) -> None:
    for title, tables, notes in found.sections():
        output.line(title)
        for caption, (columns, rows) in tables:
            output.table(columns, rows, title=caption)
        for note in notes:
            output.line(f"- {note}")
        output.line("")
