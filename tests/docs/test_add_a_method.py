"""The contributor's guide, done as it is written in a copy of the repository: a file, a row, a page, and the checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import code_blocks

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "add-a-method.md"
ROW_FILE = "tests/methods/test_contract.py"
TAKEN = ("everlora", "tests", "docs", "scripts", "pyproject.toml", "mkdocs.yml")
IGNORED = shutil.ignore_patterns("__pycache__", ".*_cache", "vit-tiny-imagenet-32", "*.pyc")


def test_the_guide_touches_one_file_one_row_and_one_page() -> None:
    titled = {block.title for block in code_blocks(PAGE) if block.title}
    assert titled == {"everlora/methods/tether.py", ROW_FILE, "docs/methods/tether.md"}
    row = next(block.code for block in code_blocks(PAGE) if block.title == ROW_FILE)
    assert len(row.splitlines()) == 1


@pytest.fixture(scope="module")
def contribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which somebody followed the guide."""
    copy = tmp_path_factory.mktemp("copy")
    for name in TAKEN:
        source = REPOSITORY / name
        shutil.copytree(source, copy / name, ignore=IGNORED) if source.is_dir() else shutil.copy(source, copy / name)
    for block in code_blocks(PAGE):
        if block.title == ROW_FILE:
            table = (copy / ROW_FILE).read_text(encoding="utf-8")
            assert table.count("\nROWS = [\n") == 1
            (copy / ROW_FILE).write_text(table.replace("\nROWS = [\n", f"\nROWS = [\n{block.code}"), encoding="utf-8")
        elif block.title:
            assert not (copy / block.title).exists()
            (copy / block.title).write_text(block.code, encoding="utf-8")
    return copy


def _in(copy: Path, *words: str) -> str:
    shared = os.environ.get("EVERLORA_SHARED", str(REPOSITORY.parent / "shared"))
    own = {"PYTHONPATH": str(copy), "EVERLORA_SHARED": shared, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_new_method_is_listed_and_keeps_what_every_method_promises(contribution: Path) -> None:
    assert "tether" in _in(contribution, "everlora", "methods")
    assert "stiffness of the spring" in _in(contribution, "everlora", "methods", "tether")
    checks = ("-p", "no:cacheprovider", "-k", "tether or every_registered_name or every_method_is_for_language")
    printed = _in(contribution, "pytest", ROW_FILE, "tests/methods/test_language_methods.py", *checks)
    assert int(printed.split(" passed")[0].split()[-1]) >= 8


@pytest.mark.slow
def test_the_new_file_and_page_pass_the_checks(contribution: Path) -> None:
    files = ["everlora/methods/tether.py", ROW_FILE]
    _in(contribution, "ruff", "check", "--no-cache", *files)
    _in(contribution, "ruff", "format", "--check", "--no-cache", *files)
    looked_at = ("tests/docs/test_pages.py", "tests/test_architecture.py", "tests/cli/test_method_options.py")
    _in(contribution, "pytest", "-p", "no:cacheprovider", "-k", "tether or names or navigation", *looked_at)
