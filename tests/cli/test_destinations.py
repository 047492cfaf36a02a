from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import everlora.experiments
import everlora.sweep
from everlora.cli import destinations, tables
from everlora.errors import DataError
from tests.cli.fakes import FakeLearner
from tests.comparison.results import folder as results_folder

SWEEP = ("sweep", "digits", "--methods", "probe", "--grid", "lr=1e-3")


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder may be written to; tests may run as root, whom permissions do not stop."""

    def refuse(**_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(destinations.tempfile, "TemporaryFile", refuse)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: type[FakeLearner]) -> Callable[[str], list[Any]]:
    """The words of a verb before its output, in a folder that has what it reads; nothing may be run or learned."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text("text\na\n")
    results_folder(tmp_path / "pets")
    for module, name in ((everlora.experiments, "run"), (everlora.sweep, "sweep")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work began"), raising=False)
    monkeypatch.setattr("everlora.comparison.compare", lambda *_, **__: pytest.fail("the work began"))
    known: dict[str, list[Any]] = {
        "predict": ["predict", "f", "--input", "in.csv", "--output"],
        "compare": ["compare", "pets", "--out"],
        "report": ["report", "pets", "--out"],
        "run": ["run", "digits", "--out"],
        "sweep": [*SWEEP, "--out"],
    }
    return known.__getitem__


NAMES = {"predict": "o.csv", "compare": "o.md", "report": "o.html", "run": "o", "sweep": "o"}


@pytest.mark.parametrize(("verb", "name"), NAMES.items())
@pytest.mark.usefixtures("locked")
def test_a_place_without_permission_is_refused_before_the_work(
    call: Any, command: Any, learner: type[FakeLearner], verb: str, name: str
) -> None:
    option = "--output" if verb == "predict" else "--out"
    said = f"error: {name} cannot be written: Permission denied; give write permission or another {option}.\n"
    assert call(*command(verb), name) == (2, "", said)
    assert learner.calls == [] and not Path(name).exists()


@pytest.mark.parametrize(("verb", "name"), [item for item in NAMES.items() if item[0] != "predict"])
def test_a_file_in_the_place_of_a_folder_is_named(
    call: Any, command: Any, tmp_path: Path, verb: str, name: str
) -> None:
    (tmp_path / "ro").write_text("")
    code, out, err = call(*command(verb), f"ro/{name}")
    assert (code, out) == (2, "")
    assert err == (
        f"error: ro/{name} cannot be written: {tmp_path / 'ro'} is a file and no folder; give write permission or "
        "another --out.\n"
    )


@pytest.mark.parametrize(("verb", "name"), [item for item in NAMES.items() if item[0] not in ("run", "sweep")])
def test_a_folder_in_the_place_of_the_file_is_refused_before_the_work(
    call: Any, command: Any, learner: type[FakeLearner], tmp_path: Path, verb: str, name: str
) -> None:
    (tmp_path / name).mkdir()
    option = "--output" if verb == "predict" else "--out"
    assert call(*command(verb), name) == (2, "", f"error: {name} is a folder; give the name of a file to {option}.\n")
    assert learner.calls == []


@pytest.mark.usefixtures("locked")
def test_the_folder_a_run_chooses_is_tried_too(call: Any, command: Any) -> None:
    code, _, err = call("run", "digits")
    assert code == 2 and "cannot be written: Permission denied" in err and err.count("\n") == 1


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    destinations.check_file(tmp_path / "new.csv")
    destinations.check_folder(tmp_path / "deep" / "er")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path(os.devnull).is_char_device(), reason="no such device here")
@pytest.mark.usefixtures("locked")
def test_nothing_is_tried_beside_a_device() -> None:
    destinations.check_file(Path(os.devnull))


def test_a_disk_that_is_full_after_the_work_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tables.os, "fsync", full)
    table = tables.InputTable(("text",), [{"text": "a"}])
    with pytest.raises(DataError, match=r"out\.csv cannot be written: No space left on device; .* another --output"):
        tables.write_table(tmp_path / "out.csv", table, [[("refund", 0.75)]])
    assert list(tmp_path.iterdir()) == []
