"""The options of a method, read from its source: importing it would bring torch into a listing."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from everlora.errors import OptionError

__all__ = ["MethodOption", "read_options"]


@dataclass(frozen=True)
class MethodOption:
    """One option as `--set` takes it.

    Attributes:
        name: its key.
        type: what it accepts, as people read it.
        default: its value when not set.
        description: what it decides.
    """

    name: str
    type: str
    default: Any
    description: str


def read_options(
    module: str, *, class_name: str | None = None, preset: dict[str, Any] | None = None
) -> tuple[MethodOption, ...]:
    """Return the fields of an options class.

    Args:
        module: dotted name of the module that defines it; it is read, not imported.
        class_name: the class; `None` takes the one that the module's method names as its `options_type`.
        preset: values that a registered name sets over the class's defaults.

    Returns:
        The options, in the order of the source.

    Raises:
        OptionError: the module defines no such class.
    """
    tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    wanted = class_name or next((name for node in classes.values() for name in _named_options(node)), None)
    if wanted not in classes:
        raise OptionError(f"{module}: its options class must stand in the same file, but was not found there.")
    described = _descriptions(ast.get_docstring(classes[wanted]) or "")
    fields = [node for node in classes[wanted].body if isinstance(node, ast.AnnAssign)]
    return tuple(_read_field(node, described, preset or {}) for node in fields)


def _source_path(module: str) -> Path:
    # Resolved by hand from the top package: finding a module the usual way imports the packages it lies in.
    top, *rest = module.split(".")
    spec = find_spec(top)
    locations = spec.submodule_search_locations if spec is not None else None
    if not locations:
        raise OptionError(f"{top}: not a package whose source can be read.")
    return Path(locations[0]).joinpath(*rest).with_suffix(".py")


def _named_options(node: ast.ClassDef) -> list[str]:
    """Names assigned to `options_type` in a class body, with or without an annotation."""
    names = []
    for entry in node.body:
        targets = entry.targets if isinstance(entry, ast.Assign) else [getattr(entry, "target", None)]
        value = getattr(entry, "value", None)
        is_ours = any(isinstance(target, ast.Name) and target.id == "options_type" for target in targets)
        if is_ours and isinstance(value, ast.Name):
            names.append(value.id)
    return names


def _read_field(node: ast.AnnAssign, described: dict[str, str], preset: dict[str, Any]) -> MethodOption:
    name = node.target.id if isinstance(node.target, ast.Name) else ast.unparse(node.target)
    default = preset[name] if name in preset else _literal(node.value)
    return MethodOption(name, _type_words(node.annotation), default, described.get(name, ""))


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:  # a constant of another module, or an expression: show it as it is written
        return ast.unparse(node)


def _type_words(node: ast.expr) -> str:
    """`Annotated[int, Field(ge=1)] | None` as `int >= 1 or none`, `Literal["a", "b"]` as `a, b`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return f"{_type_words(node.left)} or {_type_words(node.right)}"
    if isinstance(node, ast.Constant) and node.value is None:
        return "none"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return ", ".join(str(_literal(part)) for part in parts)
        if node.value.id == "Annotated":
            return " ".join([_type_words(parts[0]), " and ".join(_bounds(parts[1:]))]).strip()
        if node.value.id in {"tuple", "list"}:
            return f"list of {_type_words(parts[0])}"
    return ast.unparse(node)


def _bounds(metadata: list[ast.expr]) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    calls = [entry for entry in metadata if isinstance(entry, ast.Call)]
    return [
        f"{signs[word.arg]} {ast.unparse(word.value)}" for call in calls for word in call.keywords if word.arg in signs
    ]


def _descriptions(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a Google docstring, one line per attribute."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w+: )", "\n" + section):
        match = re.match(r"\s*(\w+): (.*)", entry, flags=re.DOTALL)
        if match is not None:
            found[match.group(1)] = " ".join(match.group(2).split()).replace("`", "")
    return found
