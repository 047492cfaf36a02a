"""Checkpoints on the disk: whole or not there, two kept, gone with their task."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from everlora.errors import StoreError
from everlora.store import LearnerStore, discard_checkpoints, newest_checkpoint, task_of_checkpoint, write_checkpoint
from tests.store.builders import add_task, make_learner, snapshot
from tests.store.test_kill_points import _die_everywhere


def _write(root: Path, step: int, *, index: int = 1) -> Path:
    arrays = {"weights": np.full((3, 2), step, dtype=np.float32), "count": np.array(step)}
    return write_checkpoint(root, task={"index": index, "name": "b"}, values={"step": step, "log": []}, arrays=arrays)


def test_the_newest_comes_back(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner")
    assert newest_checkpoint(root) is None and task_of_checkpoint(root) is None
    for step in range(1, 5):
        assert _write(root, step).name == f"00000{step}"
    assert sorted(path.name for path in (root / "checkpoint").iterdir()) == ["000003", "000004"]
    found = newest_checkpoint(root)
    assert found is not None and (found.task, found.values) == ({"index": 1, "name": "b"}, {"step": 4, "log": []})
    assert found.arrays["weights"].tolist() == [[4.0, 4.0]] * 3 and found.arrays["count"].shape == ()
    assert task_of_checkpoint(root) == {"index": 1, "name": "b"}
    files = {path.name for path in (root / "checkpoint" / "000004").iterdir()}
    assert files == {"arrays.safetensors", "checkpoint.json"}
    assert list(json.loads((root / "checkpoint" / "000004" / "checkpoint.json").read_text()))[-1] == "sha256"


def test_a_checkpoint_is_no_part_of_the_digest(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner")
    digest = LearnerStore.open(root).digest
    _write(root, 1)
    store = LearnerStore.open(root)
    store.verify()
    assert store.digest == digest


@pytest.mark.parametrize("file", ["arrays.safetensors", "checkpoint.json"])
def test_every_flipped_bit_and_every_cut_is_seen(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_learner(tmp_path / "learner")
    _write(root, 1)
    path = _write(root, 2) / file
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for harmed in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
            path.write_bytes(harmed)
            with caplog.at_level(logging.CRITICAL, "everlora"):
                found = newest_checkpoint(root)
            assert found is not None and found.values["step"] == 1
    path.unlink()
    found = newest_checkpoint(root)
    assert found is not None and found.values["step"] == 1
    assert "is passed over" in caplog.text


def test_arrays_of_another_checkpoint_and_links_outside_are_refused(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner")
    older, newer = _write(root, 1), _write(root, 2)
    shutil.copy(older / "arrays.safetensors", newer / "arrays.safetensors")
    found = newest_checkpoint(root)
    assert found is not None and found.values["step"] == 1
    shutil.move(str(newer), tmp_path / "elsewhere")
    newer.symlink_to(tmp_path / "elsewhere")
    found = newest_checkpoint(root)
    assert found is not None and found.values["step"] == 1


def test_a_finished_task_takes_its_checkpoints_along(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner")
    _write(root, 1)
    with LearnerStore.open(root, write=True) as store:
        assert (root / "checkpoint" / "000001").is_dir()
        add_task(store, "b")
    assert not (root / "checkpoint").exists() and not (root / "removed").exists()


def test_rolling_back_puts_an_unfinished_task_aside(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner", ("a", "b"), keep_states="all")
    _write(root, 1, index=2)
    with LearnerStore.open(root, write=True) as store:
        store.rollback(1)
    assert not (root / "checkpoint").exists()
    assert (root / "removed" / "0000" / "checkpoint" / "000001" / "checkpoint.json").is_file()


def test_putting_an_unfinished_task_aside(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner")
    assert discard_checkpoints(root) is None and not (root / "removed").exists()
    _write(root, 1)
    assert discard_checkpoints(root) == root / "removed" / "0000" / "checkpoint"
    assert newest_checkpoint(root) is None


@pytest.mark.parametrize("number", [28, 5])
def test_a_disk_that_refuses_leaves_the_one_before(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_learner(tmp_path / "learner")
    _write(root, 1)
    before = snapshot(root)

    def refuse(*names: object) -> None:
        raise OSError(number, os.strerror(number), str(names[0]))

    for name in ("rename", "fsync", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(StoreError, match=os.strerror(number)):
                _write(root, 2)
        assert snapshot(root) == before, name
    with pytest.raises(StoreError, match="plain JSON"):
        write_checkpoint(root, task={"index": 1}, values={"loss": float("nan")}, arrays={})
    assert snapshot(root) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_that_dies_leaves_a_whole_one(moment: str, tmp_path: Path) -> None:
    make_learner(tmp_path / "original", ("a",))
    for step in (1, 2):
        _write(tmp_path / "original", step)

    def check(root: Path) -> None:
        found = newest_checkpoint(root)
        assert found is not None and found.values["step"] in (2, 3)
        with LearnerStore.open(root, write=True) as store:
            assert not list(root.glob("checkpoint/.*"))
            again = newest_checkpoint(root)
            assert again is not None and again.values == found.values
            _write(root, 4)
            assert len(list((root / "checkpoint").iterdir())) == 2
            add_task(store, "b")
        assert not (root / "checkpoint").exists()

    def prepare(root: Path) -> None:
        shutil.copytree(tmp_path / "original", root)

    assert _die_everywhere(lambda root: _write(root, 3) and None, prepare, check, tmp_path, moment) > 8


@pytest.mark.parametrize("moment", ["before", "after"])
def test_finishing_a_task_dies_anywhere(moment: str, tmp_path: Path) -> None:
    make_learner(tmp_path / "original", ("a",))
    for step in (1, 2):
        _write(tmp_path / "original", step)

    def finish(root: Path) -> None:
        with LearnerStore.open(root, write=True) as store:
            add_task(store, "b")

    def check(root: Path) -> None:
        num_tasks = len(LearnerStore.open(root).tasks)
        with LearnerStore.open(root, write=True) as store:
            found = newest_checkpoint(root)
            if num_tasks == 1:
                assert found is not None and found.values["step"] == 2
                add_task(store, "b")
        assert not (root / "checkpoint").exists() and not list(root.glob(".checkpoint*"))

    def prepare(root: Path) -> None:
        shutil.copytree(tmp_path / "original", root)

    assert _die_everywhere(finish, prepare, check, tmp_path, moment) > 20
