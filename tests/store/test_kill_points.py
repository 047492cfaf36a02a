"""A writer that dies at any step leaves a learner that opens, and a next writer that succeeds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlora.store import LearnerStore
from tests.store.builders import HEADER, add_task, make_learner, snapshot
from tests.store.faults import Countdown, Killed


def _die_everywhere(
    action: Callable[[Path], None],
    prepare: Callable[[Path], Any],
    check: Callable[[Path], None],
    folder: Path,
    moment: str,
) -> int:
    """Run `action` once per step, dying one step later each time, until it survives; return the number of deaths."""
    for survive in range(500):
        root = folder / str(survive)
        prepare(root)
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(patch, survive, moment)
            try:
                action(root)
            except Killed:
                died = True
            else:
                died = False
        assert died == countdown.struck
        check(root)
        shutil.rmtree(root)
        if not died:
            return survive
    raise AssertionError("the action never came to an end")


def _add(root: Path) -> None:
    with LearnerStore.open(root, write=True) as store:
        add_task(store, "d")


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_adding_a_task(moment: str, tmp_path: Path) -> None:
    make_learner(tmp_path / "before", ("a", "b", "c"))
    make_learner(tmp_path / "after", ("a", "b", "c", "d"))
    digests = {
        len(store.tasks): store.digest for store in map(LearnerStore.open, (tmp_path / "before", tmp_path / "after"))
    }

    def check(root: Path) -> None:
        reader = LearnerStore.open(root)
        reader.verify()
        assert reader.digest == digests[len(reader.tasks)]
        with LearnerStore.open(root, write=True) as store:
            if len(store.tasks) == 3:
                add_task(store, "d")
            store.verify()
            assert store.digest == digests[4]
        assert sorted(path.name for path in (root / "tasks").iterdir()) == ["000-a", "001-b", "002-c", "003-d"]
        assert sorted(path.name for path in (root / "state").iterdir()) == ["002", "003"]
        assert not list(root.glob(".learner.json.tmp-*"))

    def prepare(root: Path) -> None:
        shutil.copytree(tmp_path / "before", root)

    deaths = _die_everywhere(_add, prepare, check, tmp_path, moment)
    assert deaths > 30  # bytes, folders and renames of a task, a state and the index: not one trivial step


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_creating_a_learner(moment: str, tmp_path: Path) -> None:
    def create(root: Path) -> None:
        LearnerStore.create(root, HEADER).close()

    def check(root: Path) -> None:
        if not (root / "learner.json").exists():
            create(root)
        with LearnerStore.open(root, write=True) as store:
            assert store.tasks == () and store.header == HEADER
            add_task(store, "a")
            store.verify()

    assert _die_everywhere(create, lambda root: root.parent.mkdir(exist_ok=True), check, tmp_path, moment) >= 5


@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_rolling_back(moment: str, tmp_path: Path) -> None:
    make_learner(tmp_path / "original", ("a", "b", "c"), keep_states="all")
    content = {name: data for name, data in snapshot(tmp_path / "original").items() if name != "learner.json"}

    def roll_back(root: Path) -> None:
        with LearnerStore.open(root, write=True) as store:
            store.rollback(1)

    def check(root: Path) -> None:
        reader = LearnerStore.open(root)
        reader.verify()
        assert len(reader.tasks) in (1, 3)
        roll_back(root)
        assert [task.name for task in LearnerStore.open(root).tasks] == ["a"]
        # Whenever it died, every byte is still somewhere.
        assert set(content.values()) <= set(snapshot(root).values())
        with LearnerStore.open(root, write=True) as store:
            add_task(store, "b")
            store.verify()

    def prepare(root: Path) -> None:
        shutil.copytree(tmp_path / "original", root)

    assert _die_everywhere(roll_back, prepare, check, tmp_path, moment) >= 15


def test_a_process_killed_by_the_system_gives_the_lock_back(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner", ("a",))
    program = (
        "import os, signal, sys; from everlora.store import LearnerStore; from tests.store.builders import add_task\n"
        "store = LearnerStore.open(sys.argv[1], write=True)\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "add_task(store, 'b')"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program, str(folder)], check=False, cwd=root)
    assert result.returncode == -9
    assert (folder / "tasks" / "001-b").is_dir()  # complete, but never committed
    assert len(LearnerStore.open(folder).tasks) == 1
    with LearnerStore.open(folder, write=True) as store:
        add_task(store, "b")
        store.verify()
    assert (folder / "removed" / "0000" / "tasks" / "001-b" / "task.json").is_file()
