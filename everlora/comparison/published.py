"""Figures that others published, beside ours, with the difference and with whatever is not alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlora.comparison.reading import RunFolder
from everlora.comparison.rows import ComparedRow
from everlora.errors import DataError, EverloraError
from everlora.experiments.recipe import Recipe, parse_recipe
from everlora.report import CaptionedTable, format_claims
from everlora.report.table import Statistic

__all__ = ["FIGURES", "PublishedLine", "claim_tables", "published_lines"]

# Figure of a recipe -> our numbers by the mean they take; what is published seldom says which mean it is.
_OURS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "last": (("tasks", "last"), ("samples", "last_samples")),
    "avg": (("tasks", "avg"), ("samples", "avg_samples")),
    "learning": (("tasks", "learning_til"),),
    "growth": (("tasks", "growth_per_task"),),
}
FIGURES = {"last": "Last", "avg": "Average", "learning": "When learned (TIL)", "growth": "Growth per task"}


@dataclass(frozen=True)
class PublishedLine:
    """One published figure, in percent, beside one row of ours.

    Attributes:
        row: key of our row, None where we have none.
        label: what our row, or the published one, is called.
        source: who printed it.
        figure: `last`, `avg`, `learning` or `growth`.
        published: the figure in percent.
        sd: its deviation as printed.
        ours: our fractions by mean, `tasks` and `samples`.
        differs: what of our run is not as published; empty where nothing is known to differ.
        note: what the recipe says of it.
    """

    row: str | None
    label: str
    source: str
    figure: str
    published: float
    sd: float | None
    ours: Mapping[str, Statistic]
    differs: tuple[str, ...]
    note: str

    def difference(self, mean: str) -> float | None:
        """Our figure less the published one, in points; None where we have none."""
        known = self.ours.get(mean)
        return None if known is None or known["mean"] is None else 100.0 * known["mean"] - self.published


def published_lines(folders: Sequence[RunFolder], rows: Sequence[ComparedRow]) -> list[PublishedLine]:
    """Return the figures that the recipes of these folders quote.

    Figures of the setting that was run are all there; those of another setting only where a method that we ran has none
    of ours, and the line says so.

    Args:
        folders: of one stream.
        rows: the rows made of them.
    """
    lines: list[PublishedLine] = []
    for folder in folders:
        recipe = _recipe(folder)
        entries = _entries(folder, recipe)
        at_home = {entry["method"] for entry in entries if entry.get("setting") in (None, folder.setting)}
        for entry in entries:
            if entry["method"] in at_home and entry.get("setting") not in (None, folder.setting):
                continue
            mine = [row for row in rows if _is_of(row, folder, str(entry["method"]))]
            if mine or entry.get("setting") in (None, folder.setting):
                found: Sequence[ComparedRow | None] = mine or [None]
                lines += [line for row in found for line in _lines(entry, row, folder, recipe)]
    with_rows = {(line.source, line.figure, line.published) for line in lines if line.row is not None}
    needed = [line for line in lines if line.row or (line.source, line.figure, line.published) not in with_rows]
    return list({(line.row, line.label, line.source, line.figure, line.published): line for line in needed}.values())


def claim_tables(folders: Sequence[RunFolder]) -> list[CaptionedTable]:
    """Return for each folder the claims of its recipe of which their source says something, with the verdict.

    Raises:
        DataError: the claims in a folder's results are damaged.
    """
    found = []
    for folder in folders:
        claims = [claim for claim in folder.results.get("claims") or [] if isinstance(claim, dict)]
        known = [claim for claim in claims if claim.get("published")]
        if not known:
            continue
        try:
            table = format_claims({**folder.results, "claims": known})
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder.path}/results.json is damaged: its claims cannot be read ({type(error).__name__}: {error}); "
                f"run the recipe again with --out {folder.path}."
            ) from error
        found.append(CaptionedTable(f"Claims of {folder.recipe}, held against the runs in {folder.name}", table))
    return found


def _recipe(folder: RunFolder) -> Recipe | None:
    """The recipe as it was run; None where its text is missing or of a version that reads otherwise."""
    text = (folder.results.get("recipe") or {}).get("text")
    try:
        return parse_recipe(str(text), file=folder.recipe) if text else None
    except EverloraError:
        return None


def _entries(folder: RunFolder, recipe: Recipe | None) -> list[Mapping[str, Any]]:
    """All figures of the recipe, or, without its text, those that the results quote."""
    if recipe is not None:
        return [figure.model_dump(mode="json") for figure in recipe.published]
    return [entry for entry in folder.results.get("published") or [] if entry.get("method")]


def _is_of(row: ComparedRow, folder: RunFolder, method: str) -> bool:
    return row.method.partition("/")[0] == method and any(run.folder is folder for run in row.runs)


def _lines(
    entry: Mapping[str, Any], row: ComparedRow | None, folder: RunFolder, recipe: Recipe | None
) -> list[PublishedLine]:
    label = row.label if row is not None else str(entry.get("label") or entry["method"])
    return [
        PublishedLine(
            row=None if row is None else row.key,
            label=label,
            source=str(entry.get("source") or ""),
            figure=figure,
            published=float(entry[figure]),
            sd=entry.get(f"{figure}_sd"),
            ours={} if row is None else {mean: row.statistic(name) for mean, name in names},
            differs=() if row is None else _differences(entry, folder, recipe),
            note=str(entry.get("note") or ""),
        )
        for figure, names in _OURS.items()
        if entry.get(figure) is not None
    ]


def _differences(entry: Mapping[str, Any], folder: RunFolder, recipe: Recipe | None) -> tuple[str, ...]:
    found, results = [], folder.results
    if entry.get("setting") not in (None, folder.setting):
        found.append(f"published for setting {entry['setting']}, ours is {folder.setting}")
    given = (results.get("settings") or {}).get("options") or {}
    if given:
        found.append("options given: " + ", ".join(f"{name}={value}" for name, value in given.items()))
    if recipe is not None:
        setting = recipe.settings.get(folder.setting)
        models = (setting.model if setting is not None else None) or recipe.model
        if folder.model and folder.model not in {*models, *(Path(model).name for model in models)}:
            found.append(f"other model: {folder.model}")
    return tuple(found)
