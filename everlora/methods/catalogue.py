"""Which methods exist, read from the source of this folder without importing it (and so without torch)."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from everlora.errors import OptionError, nearest

__all__ = ["DEFAULT", "RECOMMENDED", "MethodEntry", "list_methods", "method_entry"]

DEFAULT = "inflora"
"""What a learner is made with in Python where no method is named."""

RECOMMENDED: dict[str, Any] = {"method": "probe", "head": "lda", "feature_layers": 3}
"""What `everlora init` takes where no method is named, for classifiers: the best of what was measured over five
streams; see `docs/which-head.md`, to whose figures a test holds this."""


@dataclass(frozen=True)
class MethodEntry:
    """One registered name.

    Attributes:
        name: registered name, lower_snake.
        aliases: other accepted spellings.
        summary: one line, from the module's docstring or the preset's.
        module: module that defines it.
        preset: options this name sets over the class's defaults; empty for the method itself.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    module: str
    preset: dict[str, Any]


def list_methods() -> tuple[MethodEntry, ...]:
    """Return every registered method and preset, sorted by name."""
    return tuple(sorted(_entries().values(), key=lambda entry: entry.name))


def method_entry(name: str) -> MethodEntry:
    """Find a method by name or alias; `-` and `_` count alike.

    Raises:
        OptionError: no such method; the nearest names are given.
    """
    wanted = name.strip().lower().replace("-", "_")
    for entry in _entries().values():
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    names = [n for entry in _entries().values() for n in (entry.name, *entry.aliases)]
    raise OptionError(f"there is no method '{name}'; {nearest(wanted, names)}")


@cache
def _entries() -> dict[str, MethodEntry]:
    found: dict[str, MethodEntry] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in _register_calls(tree):
            summary = (ast.get_docstring(tree) or "").split("\n", 1)[0]
            for entry in _read_call(call, summary, f"everlora.methods.{path.stem}"):
                found[entry.name] = entry
    return found


def _register_calls(tree: ast.Module) -> list[ast.Call]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    calls = [deco for node in classes for deco in node.decorator_list if isinstance(deco, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "register"]


def _read_call(call: ast.Call, summary: str, module: str) -> list[MethodEntry]:
    name = ast.literal_eval(call.args[0])
    keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    aliases, about = keywords.get("aliases", {}), keywords.get("about", {})
    entries = []
    for registered, preset in {name: {}, **keywords.get("presets", {})}.items():
        known_as = tuple(alias for alias, target in aliases.items() if target == registered)
        words = f"{name} with " + ", ".join(f"{key}={value}" for key, value in preset.items())
        text = summary if registered == name else about.get(registered, words)
        entries.append(MethodEntry(registered, known_as, text, module, dict(preset)))
    return entries
