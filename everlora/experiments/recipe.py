"""Recipes: finding, reading and checking them. Imports no torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from everlora.errors import OptionError, nearest
from everlora.experiments.reading import parse_yaml
from everlora.experiments.schema import Recipe, Setting, StreamSpec

__all__ = ["Recipe", "RecipeInfo", "list_recipes", "load_recipe", "parse_recipe", "recipe_text", "stream_of"]

_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeInfo:
    """One line of the listing of recipes.

    Attributes:
        name: name to give to `run`.
        title: one line.
        status: `runs-here` or `not-run-here`.
        description: what it trains.
        methods: the rows it knows.
        settings: its settings by name, with the minutes one row and seed takes (`None` where nobody has measured).
    """

    name: str
    title: str
    status: str
    description: str
    methods: tuple[str, ...]
    settings: Mapping[str, float | None]


def list_recipes() -> list[RecipeInfo]:
    """Return the recipes that come with the package, those that run here first, then by name."""
    recipes = [parse_recipe(text, file=f"{name}.yaml") for name, text in _packaged().items()]
    recipes.sort(key=lambda recipe: (recipe.status != "runs-here", recipe.name))
    return [
        RecipeInfo(
            name=recipe.name,
            title=recipe.title,
            status=recipe.status,
            description=recipe.description,
            methods=tuple(recipe.methods),
            settings={name: setting.minutes for name, setting in recipe.settings.items()},
        )
        for recipe in recipes
    ]


def recipe_text(name: str | Path) -> str:
    """Return the text of a recipe, comments included.

    Args:
        name: a packaged recipe's name (`-` and `_` alike), or the path of a YAML file.

    Raises:
        OptionError: there is no such recipe or file.
    """
    if _is_path(name):
        path = Path(name)
        if not path.is_file():
            raise OptionError(f"{path}: there is no such recipe file; check the path.")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(f"{path}: not a text file in UTF-8; a recipe is a YAML file.") from error
    texts = _packaged()
    wanted = str(name).lower().replace("_", "-")
    if wanted not in texts:
        raise OptionError(f"There is no recipe '{name}'; {nearest(wanted, texts)}")
    return texts[wanted]


def load_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe.

    Args:
        name: a packaged recipe's name (`-` and `_` alike), or the path of a YAML file.

    Returns:
        The checked recipe.

    Raises:
        OptionError: there is no such recipe, or a field is unknown, missing or wrong.
    """
    file = str(name) if _is_path(name) else f"{str(name).lower().replace('_', '-')}.yaml"
    return parse_recipe(recipe_text(name), file=file)


def parse_recipe(text: str, *, file: str) -> Recipe:
    """Check the text of a recipe.

    Args:
        text: YAML.
        file: its name, for messages.

    Returns:
        The checked recipe.

    Raises:
        OptionError: one sentence naming `file` and the first field that is unknown, missing or wrong.
    """
    document = parse_yaml(text, file=file)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise OptionError(_sentence(error, file)) from error
    _check_references(recipe, file)
    for name, setting in recipe.settings.items():
        try:
            stream_of(recipe, setting)
        except ValidationError as error:
            raise OptionError(_sentence(error, file, StreamSpec, f"settings.{name}.stream.")) from error
    return recipe


def stream_of(recipe: Recipe, setting: Setting) -> StreamSpec:
    """Return the recipe's stream with the fields that `setting` changes."""
    return StreamSpec.model_validate(recipe.stream.model_dump() | setting.stream)


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(_ENDINGS) or "/" in name or "\\" in name


def _packaged() -> dict[str, str]:
    folder = resources.files("everlora") / "recipes"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}


def _check_references(recipe: Recipe, file: str) -> None:
    """Names that point at other parts of the recipe must be there."""
    if recipe.default_setting not in recipe.settings:
        raise OptionError(
            f"{file}: field settings has no '{recipe.default_setting}'; it is the setting that runs when none is named."
        )
    rows = [("default_methods", name) for name in recipe.default_methods]
    for key, setting in recipe.settings.items():
        rows += [(f"settings.{key}.methods", name) for name in setting.methods or ()]
    for key, claim in recipe.claims.items():
        rows += [(f"claims.{key}", name) for name in claim.rows]
    if recipe.reference is not None:
        rows.append(("reference", recipe.reference))
    for field, name in rows:
        if name not in recipe.methods:
            raise OptionError(
                f"{file}: field {field} names '{name}', which methods lacks; {nearest(name, recipe.methods)}"
            )
    for index, figure in enumerate(recipe.published):
        if figure.setting not in recipe.settings:
            known = nearest(figure.setting, recipe.settings)
            raise OptionError(
                f"{file}: field published[{index}].setting names '{figure.setting}', which settings lacks; {known}"
            )


def _sentence(error: ValidationError, file: str, model: type[BaseModel] = Recipe, prefix: str = "") -> str:
    """Turn pydantic's first complaint into one sentence.

    Unknown keys come first: a misspelt field is usually also reported as missing, and the spelling is the mend.
    """
    complaints = error.errors(include_url=False)
    first = next((one for one in complaints if one["type"] == "extra_forbidden"), complaints[0])
    field = prefix + _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return f"{file}: unknown field '{field}'; {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{file}: field '{field}' is missing; add it."
    if first["type"] == "value_error":
        return f"{file}: '{field or 'the recipe'}' {first['msg'].removeprefix('Value error, ')}."
    found = repr(first["input"])
    return f"{file}: field '{field}' has the value {found[:60]}; {first['msg'][0].lower()}{first['msg'][1:]}."


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the part of `model` that lies at `location`."""
    here: Any = model
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation if part in here.model_fields else None
            here = _strip_optional(here)
        elif typing.get_origin(here) in (dict, tuple):
            # dict[str, Part] and tuple[Part, ...]: the part's type is the last but any ellipsis.
            here = [one for one in typing.get_args(here) if one is not Ellipsis][-1]
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _strip_optional(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(annotation) if one is not type(None))
    return annotation
