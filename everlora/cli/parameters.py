"""Options that several verbs share, and the reading of `--set key=value`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from everlora.cli import completion

__all__ = [
    "AsJson",
    "BaseModel",
    "CheckpointEvery",
    "ColumnNames",
    "Debug",
    "DiscardUnfinished",
    "Folder",
    "ImageColumn",
    "LabelColumn",
    "Recipe",
    "RecipeData",
    "RecipeModel",
    "RecipeSetting",
    "Settings",
    "TextColumn",
    "columns_from",
    "parse_settings",
    "split_names",
    "whole_numbers",
]

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The learner's folder.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", metavar="SOURCE", help="Where the pretrained model lies now, if it has moved."),
]
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a recipe file.", autocompletion=completion.recipes)
]
RecipeData = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="Where the data lies, instead of the hub.")
]
RecipeModel = Annotated[str | None, typer.Option("--model", metavar="SOURCE", help="Another pretrained model.")]
RecipeSetting = Annotated[
    str | None, typer.Option("--setting", metavar="NAME", help="Which of the recipe's settings; its own otherwise.")
]
TextColumn = Annotated[str | None, typer.Option("--text-column", metavar="NAME", help="Column that holds the texts.")]
ImageColumn = Annotated[
    str | None, typer.Option("--image-column", metavar="NAME", help="Column that holds the images or their paths.")
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="Column that holds the labels.")
]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KIND=NAME",
        help="Say which column is what, such as instruction=question; for language also 'text={title}. {body}'. Repeat "
        "for more.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the library's log.")]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-every",
        metavar="N|Ns",
        help="Save the task that is being learnt after N steps, or N seconds as in 300s, and so on; 0 for never.",
    ),
]
DiscardUnfinished = Annotated[
    bool,
    typer.Option(
        "--discard-unfinished", help="Put an interrupted task aside, in 'removed', instead of going on with it."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set an option; 'everlora methods NAME' lists them. Repeat for more."
    ),
]


def _refuse_constant(word: str) -> Any:
    raise ValueError(word)


def _parse_value(word: str) -> Any:
    """Read JSON where the word is JSON, else keep the word: `0.95`, `true`, `null` and `[1, 2]` need no quotes."""
    try:
        return json.loads(word, parse_constant=_refuse_constant)
    except ValueError:
        return word


def parse_settings(settings: Iterable[str] | None, **named: Any) -> dict[str, Any]:
    """Merge repeated `key=value` words with options that have a switch of their own.

    Args:
        settings: words of the form `key=value`; `-` and `_` in a key are the same.
        **named: values of the switches; `None` means the switch was not given.

    Returns:
        The options that were given, by name. Whether they exist is for the library to say.

    Raises:
        typer.BadParameter: a word without `=`, or an option given twice.
    """
    options = {key: value for key, value in named.items() if value is not None}
    for word in settings or ():
        key, separator, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise typer.BadParameter(f"expected KEY=VALUE, found '{word}'", param_hint="--set")
        if key in options:
            raise typer.BadParameter(f"the option '{key}' is given twice", param_hint="--set")
        options[key] = _parse_value(value.strip())
    return options


def columns_from(pairs: Iterable[str] | None = None, **named: str | None) -> dict[str, str] | None:
    """Return the columns that were named, or `None` when the library shall find them by type.

    Args:
        pairs: words of the form `kind=name`; which kinds there are is for the library to say.
        **named: values of the switches; `None` means the switch was not given.

    Raises:
        typer.BadParameter: a word without `=`, or a kind given twice.
    """
    columns = {key: value for key, value in named.items() if value is not None}
    for word in pairs or ():
        kind, separator, name = word.partition("=")
        if not separator or not kind.strip() or not name.strip():
            raise typer.BadParameter(f"expected KIND=NAME, found '{word}'", param_hint="--column")
        if kind.strip() in columns:
            raise typer.BadParameter(f"the {kind.strip()} column is given twice", param_hint="--column")
        columns[kind.strip()] = name.strip()
    return columns or None


def split_names(words: str | None) -> list[str] | None:
    """Split `a,b , c` into its names; `None` stays `None`."""
    if words is None:
        return None
    return [name.strip() for name in words.split(",") if name.strip()]


def whole_numbers(words: str | None, option: str) -> list[int] | None:
    """Read `1993,1994`; `None` stays `None`.

    Args:
        words: numbers, separated by commas.
        option: which option they were given for, for the message.

    Raises:
        typer.BadParameter: one of them is no whole number.
    """
    names = split_names(words)
    if names is None:
        return None
    try:
        return [int(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected whole numbers as in 1993,1994, found '{words}'", param_hint=option
        ) from error
