"""`everlora run` and `everlora recipes`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import completion, output
from everlora.cli.destinations import check_folder
from everlora.cli.parameters import (
    AsJson,
    CheckpointEvery,
    Debug,
    DiscardUnfinished,
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

__all__ = ["recipes", "run"]


def run(
    recipe: Recipe,
    *,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            help="Rows to run, or 'all'; the recipe's own otherwise.",
            autocompletion=completion.method_list,
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="1,2", help="One run for each seed.")] = None,
    data: RecipeData = None,
    model: RecipeModel = None,
    setting: RecipeSetting = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the results go.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="Processes that share the runs, one thread each; the recipe's own otherwise.",
        ),
    ] = None,
    path_points: Annotated[
        int,
        typer.Option(
            "--path-points",
            metavar="N",
            min=0,
            help="Measure accuracy also at N weights on the line between neighbouring tasks; 0 for none.",
        ),
    ] = 0,
    track: Annotated[
        str | None,
        typer.Option(
            "--track",
            metavar="A,B",
            help="Trackers to write to, such as tensorboard or wandb.",
            autocompletion=completion.tracker_list,
        ),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    discard_unfinished: DiscardUnfinished = False,
    settings: Settings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe: methods by seeds on a stream of tasks, measured after each, with a table and a report.

    Interrupted, by Ctrl-C for instance, the same command goes on where it was.
    """
    options = parse_settings(settings)
    numbers = whole_numbers(seeds, "--seeds")
    given: dict[str, Any] = {
        "checkpoint_every": checkpoint_every,
        "discard_unfinished": discard_unfinished or None,
        "track": track,
    }
    from everlora.experiments import load_recipe

    load_recipe(recipe)  # a mistake in its name or text is told before torch is loaded, which takes seconds
    check_folder(Path.cwd() if out is None else out)
    with StageProgress() as progress:
        from everlora.experiments import run as run_recipe
        from everlora.training import signals_ask

        with signals_ask():
            results = run_recipe(
                recipe,
                methods=split_names(methods),
                seeds=numbers,
                data=data,
                model=model,
                setting=setting,
                out=out,
                options=options or None,
                progress=progress,
                workers=workers,
                path_points=path_points,
                **{name: value for name, value in given.items() if value is not None},
            )
    if as_json:
        output.emit_json(results)
        return
    from everlora.report import claims_caption, format_claims, tables

    for caption, (columns, rows) in tables(results):
        output.table(columns, rows, title=caption)
    if results.get("claims"):
        columns, rows = format_claims(results)
        output.table(columns, rows, title=claims_caption(results))
    folder = Path(results["folder"])
    output.line(f"Results: {folder / 'results.json'}")
    output.line(f"Report: {folder / 'report.html'}")


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A recipe, to read its page.", show_default=False, autocompletion=completion.recipes
        ),
    ] = None,
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or print the page of one."""
    from everlora.experiments import list_recipes, recipe_text

    if name is not None:
        text = recipe_text(name)
        if as_json:
            output.emit_json({"name": name, "text": text})
        else:
            output.line(text.rstrip())
        return
    entries = list_recipes()
    if as_json:
        output.emit_json(entries)
        return
    rows = [(entry.name, entry.title, entry.status, _times(entry.settings)) for entry in entries]
    output.table(("recipe", "what it is", "status", "time of a row and seed"), rows)
    output.line("'everlora recipes NAME' prints one; 'everlora run NAME' runs it.")


def _times(settings: Mapping[str, float | None]) -> str:
    """The minutes each setting takes, where somebody has measured them."""
    known = [f"{name} {output.duration(60 * minutes)}" for name, minutes in settings.items() if minutes is not None]
    return ", ".join(known) or "-"
