"""What the layout promises and a type checker cannot see."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import everlora
from everlora.methods.catalogue import list_methods

PACKAGE = Path(everlora.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

# Methods and data sets have names only where they are defined.
NAMES_ALLOWED_IN = ("methods", "streams", "recipes")
DATA_SETS = ("agnews", "cifar", "clinc", "digits", "gsm8k", "imagenet", "tinyshakespeare")

# Words of the language as well as names of methods: a variable `joint` or `probe` says nothing about a method.
ALSO_PLAIN_WORDS = {"independent", "joint", "probe", "replay", "seq", "sequential", "head_only", "er", "ncm"}

# Names that mean something else than the method or the data set: file -> words, each a regular expression.
OTHER_MEANINGS = {
    "backbones/cifar_network.py": r"cifarresnet",  # the name of an architecture
    "backbones/cifar_resnet.py": r"_?cifar_?resnet|cifar residual network",
    "backbones/load.py": r"_?cifar_?resnet|cifar residual network",
    # the forms of methods for other people's training loops, under the names of the methods
    "callbacks/callback.py": r"^(ewc|o_lora)$",
    "callbacks/memory.py": r"^replay$",
    "callbacks/trainer.py": r"^ilora$",
    "export/cifar_resnet.py": r"_?cifar_?(resnet|network)",
    "export/write.py": r"cifarresnet",
    "heads/statistical.py": r"^ncm$",  # the classifier of that name
    "metrics/matrix.py": r"^joint$",  # an upper bound that figures are compared with
    "metrics/printed.py": r"^inflora$",  # the public code whose way of printing is meant
    "weights/__init__.py": r"^vit-tiny-imagenet-32$",  # the name of a network
}

NEEDS_NO_TORCH = ("everlora", "everlora.errors", "everlora.metrics", "everlora.status", "everlora.store")
COMMANDS_WITHOUT_TORCH = (["--help"], ["status", "--help"], ["run", "--help"], ["methods"], ["recipes"])


def _relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _docstrings(tree: ast.Module) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) or hasattr(node, "body"):
            body = node.body if isinstance(node.body, list) else []
            # A string that stands alone as a statement documents what is above it.
            found |= {id(item.value) for item in body if isinstance(item, ast.Expr)}
    return found


def _words_of_code(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and whether it is a string, for each string and name that is code rather than documentation."""
    documentation = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value, True
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, False
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name, False
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, False


def _method_names() -> set[str]:
    return {name for entry in list_methods() for name in (entry.name, *entry.aliases)}


def _is_method_name(text: str, is_string: bool, methods: set[str]) -> bool:
    word = text.strip().lower().replace("-", "_")
    if word in methods:
        return is_string or word not in ALSO_PLAIN_WORDS
    return False


def _offences(path: Path, methods: set[str]) -> list[str]:
    found = []
    other_meaning = re.compile(OTHER_MEANINGS.get(_relative(path), r"(?!)"), re.IGNORECASE)
    for line, text, is_string in _words_of_code(ast.parse(path.read_text(encoding="utf-8"))):
        if other_meaning.search(text):
            continue
        names_data = any(name in text.lower() for name in DATA_SETS)
        if _is_method_name(text, is_string, methods) or names_data:
            found.append(f"{_relative(path)}:{line}: {text[:60]!r}")
    return found


def test_methods_and_data_sets_have_names_only_at_home() -> None:
    methods = _method_names()
    assert {"inflora", "sequential"} <= methods
    elsewhere = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0] not in NAMES_ALLOWED_IN]
    offences = [offence for path in elsewhere for offence in _offences(path, methods)]
    assert not offences, "names of methods or data sets outside methods/, streams/, recipes/:\n" + "\n".join(offences)


def test_the_search_for_names_finds_them() -> None:
    path = PACKAGE / "errors.py"
    assert _offences(path, {"inflora"}) == []
    assert _is_method_name("InfLoRA-opt", True, {"inflora_opt"})
    tree = ast.parse('"""inflora in a docstring"""\nif name == "inflora":\n    joint = 1\n')
    words = [(text, is_string) for _line, text, is_string in _words_of_code(tree)]
    assert ("inflora", True) in words and ("joint", False) in words
    assert not any("docstring" in text for text, _ in words)


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{_relative(path)} has {num_lines} lines, above {MAX_LINES}; split it by subject"


def test_every_file_has_a_subject() -> None:
    homeless = [_relative(path) for path in SOURCES if path.stem in {"utils", "common", "helpers", "misc"}]
    assert not homeless, f"{homeless}: a function has a subject, put it in a file of that name"


def test_nothing_pickles() -> None:
    users = [
        _relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and {"pickle", "dill", "joblib"} & {name.name for name in node.names})
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"})
    ]
    assert not users, f"{users}: learners and caches are JSON, safetensors and plain .npy only"


def _loaded_after(program: str) -> set[str]:
    script = f"import sys\n{program}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", NEEDS_NO_TORCH)
def test_reading_a_learner_needs_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "datasets"} & _loaded_after(f"import {module}")


@pytest.mark.parametrize("arguments", COMMANDS_WITHOUT_TORCH, ids=" ".join)
def test_help_and_listings_need_no_torch(arguments: list[str]) -> None:
    program = f"from everlora.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code"
    assert not {"torch", "transformers", "datasets"} & _loaded_after(program)


def test_status_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "from everlora.store import LearnerStore\nfrom everlora.status import read_status\n"
        f"LearnerStore.create({str(tmp_path)!r}, {{'method': 'x'}}).close()\n"
        f"assert read_status({str(tmp_path)!r})['num_tasks'] == 0"
    )
    assert "torch" not in _loaded_after(program)
