"""`everlora methods`: which methods there are, and the options of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from everlora.cli import completion, output
from everlora.cli.parameters import AsJson, Debug

if TYPE_CHECKING:
    from everlora.cli.method_options import MethodOption
    from everlora.methods.catalogue import MethodEntry

__all__ = ["methods"]

# What every learner takes beside its method's options: group -> module and class.
_SHARED_OPTIONS = {
    "training": ("everlora.training.options", "TrainingOptions"),
    "model": ("everlora.settings", "ModelOptions"),
    "learner": ("everlora.settings", "LearnerOptions"),
    "head": ("everlora.heads.statistical", "HeadOptions"),
}


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A method, to see its options.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
    *,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the methods, or the options of one of them."""
    from everlora.cli.method_options import read_options
    from everlora.methods.catalogue import list_methods, method_entry

    if name is None:
        _print_methods(list_methods(), as_json=as_json)
        return
    entry = method_entry(name)
    groups = {"method": read_options(entry.module, preset=entry.preset)}
    groups |= {group: read_options(module, class_name=cls) for group, (module, cls) in _SHARED_OPTIONS.items()}
    _print_options(entry, groups, as_json=as_json)


def _print_methods(entries: tuple[MethodEntry, ...], *, as_json: bool) -> None:
    if as_json:
        output.emit_json(entries)
        return
    rows = [(_marked(entry.name), ", ".join(entry.aliases), entry.summary) for entry in entries]
    output.table(("method", "also called", "what it does"), rows)
    output.line("'everlora methods NAME' lists the options of one.")


def _marked(name: str) -> str:
    from everlora.methods.catalogue import RECOMMENDED

    if name != RECOMMENDED["method"]:
        return name
    further = ", ".join(f"{key}={value}" for key, value in RECOMMENDED.items() if key != "method")
    return f"{name} (default, with {further})"


def _print_options(entry: MethodEntry, groups: dict[str, tuple[MethodOption, ...]], *, as_json: bool) -> None:
    if as_json:
        output.emit_json({"method": entry, "options": groups})
        return
    output.line(f"{entry.name}: {entry.summary}")
    for group, options in groups.items():
        rows = [(option.name, option.type, _as_set(option.default), option.description) for option in options]
        title = f"Options of {entry.name}" if group == "method" else f"Options of the {group}, whatever the method"
        output.table(("option", "accepts", "default", "what it decides"), rows, title=title)
    output.line("Give them to 'everlora init' or 'everlora run' as --set OPTION=VALUE.")


def _as_set(value: object) -> str:
    """A value the way `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(output.plain(value))
