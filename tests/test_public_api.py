from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import everlora

PACKAGE = Path(everlora.__file__).parent

# Packages whose names other people's code imports.
PUBLIC_PACKAGES = (
    "everlora",
    "everlora.comparison",
    "everlora.errors",
    "everlora.lowrank",
    "everlora.metrics",
    "everlora.store",
    "everlora.status",
)


def _modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _source(module: str) -> ast.Module:
    relative = Path(*module.split("."))
    path = PACKAGE.parent / relative / "__init__.py"
    if not path.is_file():
        path = (PACKAGE.parent / relative).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _declared(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def _defined(tree: ast.Module) -> set[str]:
    """Names without an underscore that a module defines itself, as classes, functions or capital constants."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


def _constants_first(name: str) -> tuple[int, str]:
    """The order of import sorters: CONSTANTS, Classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("module", _modules())
def test_every_module_says_what_is_public(module: str) -> None:
    tree = _source(module)
    declared = _declared(tree)
    if declared is None:
        assert not _defined(tree), f"{module} defines public names and has no __all__"
        return
    assert len(declared) == len(set(declared)), f"{module}.__all__ names something twice"
    orders = (None, str.casefold, _constants_first)
    assert declared in [sorted(declared, key=order) for order in orders], f"{module}.__all__ is unsorted"
    missing = _defined(tree) - set(declared)
    assert not missing, f"{module} defines {sorted(missing)} without naming them in __all__ or with an underscore"


@pytest.mark.parametrize("module", PUBLIC_PACKAGES)
def test_every_public_name_exists_and_is_documented(module: str) -> None:
    imported = importlib.import_module(module)
    assert len(imported.__all__) <= 30
    for name in imported.__all__:
        value = getattr(imported, name)
        if callable(value) and getattr(value, "__module__", "").startswith("everlora"):
            assert value.__doc__, f"{module}.{name} has no docstring"


def test_the_top_level_names() -> None:
    assert everlora.__all__ == ["Learner", "__version__", "compare", "run"]
    assert everlora.compare is importlib.import_module("everlora.comparison").compare
    assert everlora.Learner is importlib.import_module("everlora.learner").Learner
    assert everlora.run is importlib.import_module("everlora.experiments").run
    with pytest.raises(AttributeError, match="no attribute 'lerner'"):
        getattr(everlora, "lerner")  # noqa: B009 - a type checker would refuse the plain attribute


def test_the_names_are_resolved_only_when_asked_for() -> None:
    program = "import sys, everlora; assert 'everlora.learner' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version_is_the_packages() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{everlora.__version__}"\n' in project


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
