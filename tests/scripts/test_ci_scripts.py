from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _run(script: str, *arguments: str, folder: Path) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    assert result.stderr == ""
    return result.returncode, result.stdout


def _case(name: str, inside: str = "") -> str:
    return f'<testcase classname="tests.a" name="{name}">{inside}</testcase>'


def _write(path: Path, *cases: str) -> None:
    path.write_text("<testsuites><testsuite>" + "".join(cases) + "</testsuite></testsuites>")


def test_the_summary_adds_up_two_runs(tmp_path: Path) -> None:
    _write(tmp_path / "fast.xml", _case("one"), _case("two"), _case("three", "<skipped/>"))
    _write(tmp_path / "slow.xml", _case("four"))
    assert _run("ci_summary.py", "fast.xml", "slow.xml", folder=tmp_path) == (
        0,
        "everlora: 3 passed, 0 failed, 1 skipped\n",
    )


def test_a_test_that_fails_twice_counts_once(tmp_path: Path) -> None:
    _write(tmp_path / "fast.xml", _case("one", "<failure/>"), _case("one", "<error/>"), _case("two", "<error/>"))
    assert _run("ci_summary.py", "fast.xml", folder=tmp_path) == (1, "everlora: 0 passed, 2 failed\n")


@pytest.mark.parametrize("content", [None, "", "<testsuites>", "<testsuites/>"])
def test_a_run_without_results_has_failed(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "slow.xml").write_text(content)
    _write(tmp_path / "fast.xml", _case("one"))
    status, text = _run("ci_summary.py", "fast.xml", "slow.xml", folder=tmp_path)
    assert status == 1 and text.splitlines()[-1] == "everlora: 1 passed, 1 failed"
    assert "slow.xml" in text


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("good.toml", "a = 1", None),
        ("bad.toml", "a = ", "does not parse"),
        ("good.yaml", "a: [1]", None),
        ("bad.yaml", "a: [1", "does not parse"),
        ("bad.ipynb", '{"cells": [{"outputs": [1]}]}', "holds output"),
        ("large.txt", "x" * 250_001, "above 250000"),
        ("everlora/weights/large.txt", "x" * 250_001, None),
    ],
)
def test_files_are_checked(name: str, content: str, complaint: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    status, text = _run("check_files.py", name, "deleted.txt", folder=tmp_path)
    assert status == (complaint is not None)
    assert (complaint or "") in text
