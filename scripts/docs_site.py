"""What building the documentation adds to its pages: the list of pages, tables of options, formulas.

MkDocs loads this file (`hooks` in `mkdocs.yml`). Tables are read from the source at every build, so they cannot differ
from it; formulas become MathML, so no script has to be fetched to read them. In a page

    <!-- options of inflora -->      is the table of a method's options; `training`, `model`, `learner` work alike
    <!-- methods -->                 is the table of all methods
    <!-- recipes -->                 is the table of the packaged recipes
    <!-- names of everlora.store --> are the docstrings of all public names of a module
    <!-- file: CHANGELOG.md -->      is that file of the repository
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from everlora.cli.method_options import read_options
from everlora.errors import DataError
from everlora.experiments import list_recipes
from everlora.methods import list_methods, method_entry

__all__ = ["on_config", "on_page_markdown", "options_table", "pages_of", "public_names", "rendered"]

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_OPTIONS = {
    "training": ("everlora.training.options", "TrainingOptions"),
    "model": ("everlora.settings", "ModelOptions"),
    "learner": ("everlora.settings", "LearnerOptions"),
}
MARK = re.compile(
    r"<!-- (?:options of (?P<options>\w+)|names of (?P<names>[\w.]+)|(?P<listing>methods|recipes)"
    r"|file: (?P<file>[\w.]+)) -->"
)
FENCE = re.compile(r"^( *```.*?^ *```$)", flags=re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """Complete the navigation: leave out pages that are not there, and put in those that `FOLDER/*` stands for."""
    folder = Path(config["docs_dir"])
    config["nav"] = pages_of(config["nav"], folder)
    return config


def pages_of(nav: list[Any], folder: Path) -> list[Any]:
    """Return a navigation with every `FOLDER/*` replaced by pages of that folder that are named nowhere else.

    Args:
        nav: pages as strings, and dicts of a title and a page or a further list.
        folder: where the pages lie.
    """
    named = set(_named(nav))

    def filled(entries: list[Any]) -> list[Any]:
        found: list[Any] = []
        for entry in entries:
            title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
            pages = filled(value) if isinstance(value, list) else _matching(value, folder, named)
            if not pages:
                continue
            if title is None:
                found += pages
            else:
                found.append({title: pages if isinstance(value, list) or value.endswith("/*") else pages[0]})
        return found

    return filled(nav)


def _named(nav: Iterable[Any]) -> Iterable[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from _named(value) if isinstance(value, list) else (value,)


def _matching(page: str, folder: Path, named: set[str]) -> list[str]:
    if page.endswith("/*"):
        found = (path.relative_to(folder).as_posix() for path in sorted(folder.glob(f"{page}.md")))
        return [name for name in found if name not in named]
    return [page] if (folder / page).is_file() else []


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page asks for."""
    return rendered(markdown)


def rendered(markdown: str) -> str:
    """Return a page with its marks replaced, and formulas between `$$` as MathML; blocks of code stay as they are."""
    parts = FENCE.split(markdown)
    return "".join(part if index % 2 else _filled(part) for index, part in enumerate(parts))


def _filled(text: str) -> str:
    return FORMULA.sub(_formula, MARK.sub(_replacement, text))


def _formula(match: re.Match[str]) -> str:
    return f'\n<div class="formula">{convert(match.group(1).strip(), display="block")}</div>\n'


def _replacement(match: re.Match[str]) -> str:
    if match["options"]:
        return options_table(match["options"])
    if match["names"]:
        return "\n\n".join(f"::: {match['names']}.{name}" for name in public_names(match["names"]))
    if match["file"]:
        return (REPOSITORY / match["file"]).read_text(encoding="utf-8")
    listing: dict[str, Callable[[], str]] = {"methods": _methods_table, "recipes": _recipes_table}
    return listing[match["listing"]]()


def options_table(name: str) -> str:
    """Return the options of a method, or of `training`, `model` or `learner`, as a Markdown table.

    Raises:
        OptionError: there is no such method.
    """
    if name in SHARED_OPTIONS:
        module, class_name = SHARED_OPTIONS[name]
        options = read_options(module, class_name=class_name)
    else:
        entry = method_entry(name)
        options = read_options(entry.module, preset=entry.preset)
    undescribed = [option.name for option in options if not option.description]
    if undescribed:
        raise DataError(f"options of '{name}' without a description: {', '.join(undescribed)}; say in the docstring.")
    rows = [(f"`{o.name}`", o.type, f"`{_as_set(o.default)}`", o.description) for o in options]
    return _table(("option", "accepts", "default", "what it decides"), rows)


def public_names(module: str) -> list[str]:
    """Return what a module names in `__all__`, classes first, read without importing it."""
    path = REPOSITORY.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            names: list[str] = [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
            return sorted(names, key=lambda name: (not name[0].isupper() or name.isupper(), name))
    raise DataError(f"{module}: the documentation wants its public names, but it has no __all__.")


def _as_set(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _methods_table() -> str:
    pages = REPOSITORY / "docs" / "methods"
    rows = []
    for entry in list_methods():
        shown = f"[`{entry.name}`]({entry.name}.md)" if (pages / f"{entry.name}.md").is_file() else f"`{entry.name}`"
        rows.append((shown, ", ".join(entry.aliases), entry.summary))
    return _table(("method", "also called", "what it does"), rows)


def _recipes_table() -> str:
    rows = [(f"`{info.name}`", info.title, info.status, info.description) for info in list_recipes()]
    return _table(("recipe", "what it measures", "status", ""), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
