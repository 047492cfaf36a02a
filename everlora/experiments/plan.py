"""A plan: which rows with which seeds, on what, with which options; the same for every process that works on it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from everlora.backbones import resolve_source
from everlora.errors import ModelError, OptionError, nearest
from everlora.experiments.data import Progress, Splits, build_stream, general_sets, read_splits
from everlora.experiments.recipe import parse_recipe, stream_of
from everlora.experiments.schema import MethodRow, Recipe, Setting
from everlora.experiments.sources import Source, given_part
from everlora.methods import list_methods, method_spec
from everlora.settings import Settings
from everlora.streams import Examples, Stream

__all__ = [
    "DATA_HASH",
    "Plan",
    "StreamSource",
    "Streams",
    "as_read",
    "changes",
    "fingerprint_of",
    "identity",
    "make_plan",
    "method_row",
    "row_options",
]

Given = Mapping[str, Any]

ALL_ROWS = "all"
DATA_HASH = "data_hash"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers but the data itself, and how much is measured.

    Attributes:
        text: the recipe as written.
        file: its name, for messages.
        setting_name: which setting.
        rows: the rows to run, in order.
        seeds: the seeds to run, in order.
        model: the base model that was found.
        data: data given instead of the recipe's.
        options: options given for every row.
        path_points: places at which accuracy is measured between two tasks' weights; decides no other number.
        saving: how the task that is being learned is saved, as `Learner.learn` takes it; decides no number.
        track: names of trackers; decides no number.
    """

    text: str
    file: str
    setting_name: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    data: Any = None
    options: Given = field(default_factory=dict)
    path_points: int = 0
    saving: Given = field(default_factory=dict)
    track: tuple[str, ...] = ()

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe, read from its text."""
        return parse_recipe(self.text, file=self.file)

    @property
    def setting(self) -> Setting:
        """The chosen setting."""
        return self.recipe.settings[self.setting_name]

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Pairs of row and seed; one seed's rows stand together, so that they share its stream."""
        return [(row, seed) for seed in self.seeds for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; data in memory is left out."""
        data = str(self.data) if isinstance(self.data, str | Path) else None
        return {
            "file": self.file,
            "text": self.text,
            "setting": self.setting_name,
            "rows": list(self.rows),
            "seeds": list(self.seeds),
            "model": self.model,
            "data": data,
            "options": as_read(self.options),
            "path_points": self.path_points,
            "saving": dict(self.saving),
            "track": list(self.track),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Read what `to_json` returned."""
        return cls(
            text=values["text"],
            file=values["file"],
            setting_name=values["setting"],
            rows=tuple(values["rows"]),
            seeds=tuple(values["seeds"]),
            model=values["model"],
            data=values["data"],
            options=values["options"],
            path_points=values.get("path_points", 0),
            saving=values.get("saving", {}),
            track=tuple(values.get("track", ())),
        )


class StreamSource(Protocol):
    """What a run takes its rows from."""

    def __call__(self, seed: int) -> Stream:
        """Return the stream of one seed."""

    def general(self) -> list[tuple[str, Examples]]:
        """Name and test rows of each data set of general abilities."""


class Streams:
    """The streams of a plan by seed. The data is read once, and the newest stream is kept."""

    def __init__(self, plan: Plan, progress: Progress | None = None) -> None:
        self._plan, self._progress = plan, progress
        self._recipe, self._setting = plan.recipe, plan.setting
        self._parts: list[tuple[str, Splits]] | None = None
        self._sources: list[Source] = []
        self._newest: tuple[int, Stream] | None = None
        self._general: list[tuple[str, Examples]] | None = None

    def __call__(self, seed: int) -> Stream:
        """Return the stream of one seed."""
        if self._newest is None or self._newest[0] != seed:
            stream = stream_of(self._recipe, self._setting)
            made = build_stream(self._recipe, self._setting, stream, self._read(), seed=seed)
            self._newest = (seed, made)
        return self._newest[1]

    @property
    def source(self) -> str:
        """Where the data was read from, as one line."""
        self._read()
        return ", ".join(source.text for source in self._sources)

    @property
    def fingerprint(self) -> str:
        """Hash of all rows that were read, whatever part of them is used."""
        return fingerprint_of(self._read())

    def general(self) -> list[tuple[str, Examples]]:
        """Name and test rows of each data set of general abilities; the same for every seed."""
        if self._general is None:
            self._general = general_sets(self._recipe, self._setting)
        return self._general

    def _read(self) -> list[tuple[str, Splits]]:
        if self._parts is None:
            recipe, given = self._recipe, self._plan.data
            specs = recipe.data.sets or (recipe.data,)
            is_language = recipe.stream.scenario == "language"
            parts = []
            for spec in specs:
                part = given_part(given, spec.name, recipe.name) if len(specs) > 1 else given
                splits, source = read_splits(
                    spec, part, recipe=recipe.name, progress=self._progress, is_language=is_language
                )
                parts.append((spec.name or recipe.name, splits))
                self._sources.append(source)
            self._parts = parts
        return self._parts


def make_plan(
    text: str,
    *,
    file: str,
    setting: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    model: str | Path | None = None,
    data: Any = None,
    options: Given | None = None,
) -> Plan:
    """Check the choices against the recipe and find its base model.

    Args:
        text: the recipe as written.
        file: its name, for messages.
        setting: one of its settings; `None` takes the recipe's default.
        methods: rows to run; a registered method that the recipe has no row for runs with its defaults. `None` takes
            the recipe's default rows, baselines included; given names run exactly as given. `all` stands for every
            row of the recipe.
        seeds: seeds to run; `None` takes the recipe's.
        model: base model instead of the recipe's candidates.
        data: data instead of the recipe's.
        options: options for every row whose method knows them.

    Returns:
        The plan.

    Raises:
        OptionError: a setting, row, seed or option is not known.
        ModelError: none of the base models can be found.
    """
    recipe = parse_recipe(text, file=file)
    setting = recipe.default_setting if setting is None else setting
    if setting not in recipe.settings:
        raise OptionError(f"Recipe '{recipe.name}' has no setting '{setting}'; {nearest(setting, recipe.settings)}")
    chosen = recipe.settings[setting]
    default_rows = chosen.methods or recipe.default_methods
    rows = tuple(dict.fromkeys(_row_names(recipe, default_rows if methods is None else methods)))
    wanted_seeds = tuple(dict.fromkeys((chosen.seeds or recipe.seeds) if seeds is None else seeds))
    if not rows or not wanted_seeds:
        raise OptionError(f"Recipe '{recipe.name}' was given no methods or no seeds; name at least one of each.")
    plan = Plan(text, file, setting, rows, wanted_seeds, "", data, dict(options or {}))
    _check_options(plan, recipe)
    found = str(model) if model is not None else _first_model(recipe, chosen)
    return dataclasses.replace(plan, model=found)


def method_row(recipe: Recipe, row: str) -> MethodRow:
    """Return the recipe's row of that name, or a plain one for a registered method it does not mention."""
    return recipe.methods.get(row) or MethodRow(method=row)


def row_options(plan: Plan, row: str, seed: int, num_tasks: int) -> dict[str, Any]:
    """Return the options a row's learner is made with.

    Later sources win: recipe, setting, row, the caller's. An option that belongs to methods reaches only the rows whose
    method has it; the number of tasks goes to every method that asks for it.

    Args:
        plan: the plan.
        row: name of the row.
        seed: the run's seed, from which all its randomness follows.
        num_tasks: tasks of the stream.
    """
    recipe, setting = plan.recipe, plan.setting
    spec = method_row(recipe, row)
    known = set(method_spec(spec.method).option_names)
    options: dict[str, Any] = {**recipe.backbone, **setting.backbone, **recipe.training, **setting.training}
    options |= _suitable(setting.set, known) | spec.set | _suitable(plan.options, known)
    if "total_tasks" in known:
        options.setdefault("total_tasks", num_tasks)
    return options | {"seed": seed}


def changes(before: Given, values: Given, names: Sequence[str]) -> list[str]:
    """What of a plan is not as it was when it was written to a folder, in the reader's words.

    Folders of earlier versions may lack a field; that is no change.
    """
    words = {"text": "recipe text", "first_task": "choice of tasks", DATA_HASH: "state of the data"}
    return [words.get(name, name) for name in names if before.get(name, values[name]) != values[name]]


def fingerprint_of(parts: Sequence[tuple[str, Splits]]) -> str:
    """Return one hash of data sets, over every row of their splits."""
    return identity({"parts": [[name, {split: rows.fingerprint for split, rows in of.items()}] for name, of in parts]})


def as_read(options: Given) -> dict[str, Any]:
    """Options as they are once written and read again: tuples are lists then, and all keys are texts."""
    read: dict[str, Any] = json.loads(json.dumps(dict(options)))
    return read


def identity(values: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of plain values in canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _row_names(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The rows that are meant, `all` being every row of the recipe."""
    found: list[str] = []
    for name in names:
        found += list(recipe.methods) if name.strip().lower() == ALL_ROWS else [_row_name(recipe, name)]
    return found


def _row_name(recipe: Recipe, name: str) -> str:
    """Find a row by name, `-` and `_` alike; any registered method is a row with its defaults."""
    wanted = name.strip().lower().replace("-", "_")
    if wanted in recipe.methods:
        return wanted
    names = {alias: entry.name for entry in list_methods() for alias in (entry.name, *entry.aliases)}
    if wanted not in names:
        known = nearest(wanted, {*recipe.methods, *names})
        raise OptionError(f"Recipe '{recipe.name}' has no row '{name}', and no method is called so; {known}")
    return names[wanted]


def _first_model(recipe: Recipe, setting: Setting) -> str:
    reasons = []
    for candidate in setting.model or recipe.model:
        try:
            resolve_source(candidate)
        except ModelError as error:
            reasons.append(f"{candidate} ({str(error).rstrip('.')})")
        else:
            return candidate
    raise ModelError(f"No base model of recipe '{recipe.name}' is here: {'; '.join(reasons)}; give one with --model.")


@functools.cache
def _method_options() -> dict[str, set[str]]:
    return {entry.name: set(method_spec(entry.name).option_names) for entry in list_methods()}


def _suitable(options: Given, known: set[str]) -> dict[str, Any]:
    """Leave out options that belong to methods, but not to this one; the rest are training or backbone options."""
    foreign = set().union(*_method_options().values()) - known
    return {key: value for key, value in options.items() if key not in foreign}


def _check_options(plan: Plan, recipe: Recipe) -> None:
    """Refuse wrong options before anything runs, also those that would be dropped because no chosen row has them."""
    by_method = _method_options()
    chosen = set().union(*(method_spec(method_row(recipe, row).method).option_names for row in plan.rows))
    given: dict[str, Given] = {"recipe": recipe.training, "setting": plan.setting.training | plan.setting.set}
    given |= {f"row {row}": method_row(recipe, row).set for row in plan.rows} | {"options given": plan.options}
    if where := next((name for name, options in given.items() if "seed" in options), None):
        raise OptionError(f"The {where} may not set 'seed', which every run has its own of; name seeds with --seeds.")
    for key in plan.options:
        owners = sorted(name for name, names in by_method.items() if key in names)
        if owners and key not in chosen:
            raise OptionError(f"No row of this run has the option '{key}'; it belongs to {', '.join(owners)}.")
    for row in plan.rows:
        # Any number of tasks does here: how many there are is only known once the data is read.
        Settings.of(method_row(recipe, row).method, row_options(plan, row, plan.seeds[0], num_tasks=1))
