"""What is recorded of others' figures and claims: read, checked, put into one form.

Figures stand in `published` of the recipes, and in docs/published/, one file a system, where no recipe can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from everlora.errors import DataError
from everlora.experiments import load_recipe
from everlora.experiments.schema import PublishedFigure, Recipe
from everlora.experiments.schema_part import Part

__all__ = [
    "Claim",
    "Evidence",
    "Figure",
    "Smaller",
    "Source",
    "System",
    "Value",
    "Verdict",
    "all_figures",
    "read_systems",
    "recipe",
]

REPOSITORY = Path(__file__).resolve().parents[1]
PUBLISHED = REPOSITORY / "docs" / "published"
# In the order of the page.
SYSTEMS = ("inflora", "lgq-coding", "sd-lora", "convlora", "i-lora")

Value = int | float | tuple[int | float, ...]
Verdict = Literal["confirmed", "not confirmed", "open"]


class Source(Part):
    """Who printed figures; `what` and `reason` stand for those of a recipe that is of another stream or model."""

    kind: Literal["paper", "official log", "reproduction", "other's code", "README"]
    note: str = ""
    what: str = ""
    reason: str = ""


class Figure(Part):
    """What one source printed of one experiment; `recipe`, `setting` and `row` would reproduce it, else `reason`."""

    source: str
    what: str
    values: dict[str, Value] = Field(min_length=1)
    sd: dict[str, float] = Field(default={})
    decimals: int = 2
    recipe: str = ""
    setting: str = "standard"
    row: str = ""
    reason: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _is_reproduced_or_says_why_not(self) -> Figure:
        if bool(self.recipe and self.row) == bool(self.reason):
            raise ValueError(f"{self.what}: give recipe and row, or the reason why there are none")
        return self


class Evidence(Part):
    """How a claim is decided: by a result, by tests, or by what was read of the source (a page of ours)."""

    result: str = ""
    test: Literal["greater", "less", "near", "at_most", "falls"] | None = None
    row: str = ""
    against: str = ""
    figures: tuple[str, ...] = ()
    margin: float = 0.0
    at_least: float = 0.0
    panel: str = ""
    tests: tuple[str, ...] = ()
    read: str = ""
    verdict: Verdict | None = None
    because: str = ""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Evidence:
        if sum(map(bool, (self.result, self.tests, self.read))) != 1:
            raise ValueError("is decided by one of result, tests and read")
        if bool(self.result) == bool(self.verdict):
            raise ValueError("has a verdict of its own exactly where no result decides")
        return self


class Claim(Part):
    """Something a source says, in our words; `open` is the reason why it is not decided."""

    claim: str
    source: str
    published: str = ""
    by: Evidence | None = None
    open: str = ""

    @model_validator(mode="after")
    def _is_decided_or_open(self) -> Claim:
        if bool(self.by) == bool(self.open):
            raise ValueError(f"{self.claim}: give how it is decided, or why it is open")
        return self


class Smaller(Part):
    """A run of ours of the same protocol on a smaller scale."""

    result: str
    instead_of: str
    figures: tuple[str, ...]
    differs: str
    rows: tuple[str, ...] = ()
    page: str = ""


class System(Part):
    """One published system: `recipes` names what each setting of each recipe is.

    `claims_of` names results whose recipes hold claims of the system, and who makes them; `hypotheses_of` likewise
    those of our own.
    """

    title: str
    about: str
    recipes: dict[str, dict[str, str]]
    sources: dict[str, Source]
    figures: tuple[Figure, ...] = ()
    smaller: tuple[Smaller, ...] = ()
    claims: tuple[Claim, ...] = ()
    claims_of: dict[str, str] = Field(default={})
    hypotheses_of: dict[str, str] = Field(default={})


def read_systems(folder: Path = PUBLISHED) -> dict[str, System]:
    """Return what is recorded of each system, by the name of its file."""
    found = {path.stem: path for path in folder.glob("*.yaml")}
    if set(found) != set(SYSTEMS):
        raise DataError(f"{folder} holds {', '.join(sorted(found))}, expected {', '.join(SYSTEMS)}; name them alike.")
    return {name: System.model_validate(yaml.safe_load(found[name].read_text(encoding="utf-8"))) for name in SYSTEMS}


@cache
def recipe(name: str) -> Recipe:
    """Return a packaged recipe, read once."""
    return load_recipe(name)


def all_figures(system: System) -> list[Figure]:
    """Return the figures of a system: those of its recipes, then those that no recipe holds.

    Raises:
        DataError: a recipe quotes a source that the system's file does not know.
    """
    found = []
    for name, settings in system.recipes.items():
        for entry in recipe(name).published:
            if entry.source not in system.sources:
                raise DataError(f"recipe {name} quotes '{entry.source}', which is no source of {system.title}; add it.")
            values = _values(entry)
            if values:
                found.append(_of_recipe(name, settings, entry, values, system.sources[entry.source]))
    return [*found, *system.figures]


def _values(entry: PublishedFigure) -> dict[str, Value]:
    names = {"last": "last", "avg": "avg", "learning": "learning_til", "growth": "growth_per_task"}
    return {ours: value for name, ours in names.items() if (value := getattr(entry, name)) is not None}


def _of_recipe(
    name: str, settings: Mapping[str, str], entry: PublishedFigure, values: dict[str, Value], source: Source
) -> Figure:
    sd = {key: value for key, value in (("last", entry.last_sd), ("avg", entry.avg_sd)) if value is not None}
    has_recipe = not source.reason
    return Figure(
        source=entry.source,
        what=f"{source.what or settings[entry.setting]} ({recipe(name).methods[entry.method].label})",
        values=values,
        sd=sd,
        recipe=name if has_recipe else "",
        setting=entry.setting,
        row=entry.method if has_recipe else "",
        reason=source.reason,
        note=entry.note or "",
    )
