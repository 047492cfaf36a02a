"""`everlora sweep`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import output
from everlora.cli.destinations import check_folder
from everlora.cli.parameters import (
    AsJson,
    Debug,
    Recipe,
    RecipeData,
    RecipeModel,
    RecipeSetting,
    Settings,
    parse_settings,
    split_names,
    whole_numbers,
)
from everlora.cli.progress import StageProgress

__all__ = ["sweep"]


def sweep(
    recipe: Recipe,
    *,
    methods: Annotated[str, typer.Option("--methods", metavar="A,B", help="Rows to try, or 'all'.")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=VALUES",
            help="An option and its values, as in lr=1e-3,3e-3; for --random also a range: 0..1, log:1e-4..1e-1, "
            "int:2..16. Repeat for more.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the results go.")],
    random: Annotated[
        int | None,
        typer.Option("--random", metavar="N", min=1, help="Draw N settings instead of trying every combination."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that draw.")] = 0,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="1,2", help="Try each setting with each; the recipe's first if not given."),
    ] = None,
    first_task: Annotated[
        bool,
        typer.Option("--first-task", help="Learn the first task, judged by a fifth of its training rows; the default."),
    ] = False,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="FRACTION",
            help="Learn the whole stream, judged by this share of each task's training rows.",
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="last, the accuracy at the end, or avg, its mean over the stream.")
    ] = "last",
    data: RecipeData = None,
    model: RecipeModel = None,
    setting: RecipeSetting = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Processes, of one thread each.")] = 1,
    backend: Annotated[
        str, typer.Option("--backend", help="local, or ray: Ray Tune, with DIR on a disk that all machines share.")
    ] = "local",
    settings: Settings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search for good options, on training rows alone: no test row is read.

    Interrupted, by Ctrl-C for instance, the same command goes on where it was.
    """
    if first_task and validation is not None:
        raise typer.BadParameter("choose one of --first-task and --validation", param_hint="--validation")
    space = _space(grid)
    check_folder(out)
    with StageProgress() as progress:
        from everlora.sweep import sweep as search
        from everlora.training import signals_ask

        with signals_ask():
            results = search(
                recipe,
                space,
                methods=split_names(methods) or [],
                out=out,
                random=random,
                seed=seed,
                seeds=whole_numbers(seeds, "--seeds"),
                validation=validation,
                metric=metric,
                setting=setting,
                data=data,
                model=model,
                options=parse_settings(settings),
                workers=workers,
                backend=backend,
                progress=progress,
            )
    if as_json:
        output.emit_json(results)
    else:
        common = _words({"--data": data, "--model": model, "--setting": setting}, settings or ())
        _print(results, recipe, common)


def _space(words: list[str]) -> dict[str, Any]:
    """Option to its values, as they were written."""
    space: dict[str, Any] = {}
    for word in words:
        key, separator, values = word.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key or not values.strip():
            raise typer.BadParameter(f"expected KEY=VALUES, found '{word}'", param_hint="--grid")
        if key in space:
            raise typer.BadParameter(f"the option '{key}' is given twice; list its values once", param_hint="--grid")
        space[key] = values
    return space


def _words(given: Mapping[str, str | None], settings: Sequence[str]) -> list[str]:
    """What the settings of a sweep have in common, as `everlora run` takes it."""
    pairs = [(option, value) for option, value in given.items() if value is not None]
    pairs += [("--set", setting) for setting in settings]
    return [word for pair in pairs for word in pair]


def _print(results: dict[str, Any], recipe: str, common: Sequence[str]) -> None:
    from everlora.report.sweep import best_lines, sweep_columns, sweep_rows

    how = "first task" if results["first_task"] else "whole stream"
    title = f"{how}, judged by {results['fraction']:.0%} of the training rows"
    output.table(sweep_columns(results), sweep_rows(results), title=title)
    for line in best_lines(results):
        output.line(line)
    for row, best in results["best"].items():
        command = shlex.join(["everlora", "run", recipe, "--methods", row, *common])
        output.line(f"Run it: {command} {best['set']}".rstrip())
    folder = Path(results["folder"])
    output.line(f"Results: {folder / 'sweep.json'}, {folder / 'sweep.md'}")
    output.line(f"Picture: {folder / 'sweep.html'}")
