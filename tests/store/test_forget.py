"""Forgetting in a directory: what is replaced is deleted, at one moment, and a kill leaves the old or the new."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from everlora.errors import StoreError
from everlora.store import LearnerStore, Replacement
from tests.store.builders import HEADER, add_task, make_learner, snapshot
from tests.store.faults import Countdown, Killed

SECRET = np.frombuffer(b"a secret of 32 bytes to be found", dtype=np.uint8)
OTHER = np.frombuffer(b"what may stay, 32 bytes as well.", dtype=np.uint8)
KEPT = "validation.safetensors"
RECORD = {"when": "2026-01-01", "left": {"validation_rows": 1}}


def _learner(folder: Path) -> Path:
    """Two tasks with all states; the first one's rows and both states hold a secret."""
    with LearnerStore.create(folder, HEADER, keep_states="all") as store:
        for number, rows in enumerate(([SECRET, OTHER], [OTHER])):
            store.write_task(
                f"task {number}",
                record={"labels": ["a"], "num_validation": len(rows), "values": {}},
                arrays={KEPT: {"rows": np.stack(rows)}, "stable/added.safetensors": {"bias": np.ones(2)}},
                documents={"adapter_config.json": {"r": 2}},
                state_arrays={"buffer": np.stack([SECRET, OTHER]), "magnitudes": np.ones(3)},
                state_values={"num_seen": number},
                log=[{"step": 1, "loss": 0.5}],
            )
    checkpoint = folder / "checkpoint" / "000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "arrays.safetensors").write_bytes(SECRET.tobytes())
    return folder


def _forget(root: Path) -> None:
    with LearnerStore.open(root, write=True) as store:
        if "forgotten" in store.header:
            return
        states = {entry.index: {**store.read_state(entry.index)[0], "buffer": OTHER[None]} for entry in store.states}
        change = Replacement({"num_validation": 1}, {KEPT: {"rows": OTHER[None]}})
        store.forget({0: change}, states, record=RECORD, delete=["checkpoint"])


def _holds_secret(root: Path) -> bool:
    return any(SECRET.tobytes() in data for data in snapshot(root).values())


def test_what_is_replaced_is_gone_and_the_rest_is_the_same(tmp_path: Path) -> None:
    root = _learner(tmp_path / "learner")
    before = LearnerStore.open(root)
    digest = before.digest
    assert _holds_secret(root)
    _forget(root)
    after = LearnerStore.open(root)
    after.verify()
    assert not _holds_secret(root) and not (root / "checkpoint").exists() and not (root / "removed").exists()
    assert after.digest != digest
    task = after.read_task(0)
    assert task.entry.folder == "tasks/000-task-0-v2" and task.record["num_validation"] == 1
    assert task.files == ("adapter_config.json", "log.jsonl", "stable/added.safetensors", KEPT)
    assert after.tasks[1] == before.tasks[1]
    assert after.header["forgotten"] == [RECORD] and "forgetting" not in after.header
    assert {path.name for path in (root / "state").iterdir()} == {"000-v2", "001-v2"}
    arrays, values = after.read_state(0)
    assert values == {"num_seen": 0} and arrays["magnitudes"].tolist() == [1, 1, 1]


def test_a_file_may_go_and_forgetting_goes_on(tmp_path: Path) -> None:
    root = _learner(tmp_path / "learner")
    _forget(root)
    with LearnerStore.open(root, write=True) as store:
        store.forget({0: Replacement(arrays={KEPT: None})}, {}, record=RECORD)
        assert KEPT not in store.read_task(0).files and store.tasks[0].folder == "tasks/000-task-0-v3"
        assert len(store.header["forgotten"]) == 2
        store.rollback(1)
        assert store.read_state()[1] == {"num_seen": 0}
        store.verify()
    assert sorted(path.name for path in (root / "removed" / "0000" / "state").iterdir()) == ["001-v2"]


def test_the_record_and_where_the_folders_lie_do_not_enter_the_digest(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        root = _learner(tmp_path / name)
        _forget(root)
        if name == "b":
            with LearnerStore.open(root, write=True) as store:
                store.forget({}, {}, record={"when": "later"})
        digests.add(LearnerStore.open(root).digest)
    assert len(digests) == 1


def test_superseded_states_of_a_rewritten_learner_are_still_deleted(tmp_path: Path) -> None:
    root = make_learner(tmp_path / "learner", ("a", "b"))
    with LearnerStore.open(root, write=True) as store:
        store.forget({}, {0: {"magnitudes": np.ones(1)}, 1: {"magnitudes": np.ones(1)}}, record=RECORD)
        add_task(store, "c")
        add_task(store, "d")
    assert {path.name for path in (root / "state").iterdir()} == {"002", "003"} and not (root / "removed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_leaves_the_old_or_the_new_and_the_next_writer_deletes(moment: str, tmp_path: Path) -> None:
    original = _learner(tmp_path / "original")
    old = LearnerStore.open(original).digest
    done = tmp_path / "done"
    shutil.copytree(original, done)
    _forget(done)
    new = LearnerStore.open(done).digest
    seen = set()
    for survive in range(400):
        root = tmp_path / str(survive)
        shutil.copytree(original, root)
        died = True
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(patch, survive, moment)
            try:
                _forget(root)
                died = False
            except Killed:
                pass
        assert died == countdown.struck
        reader = LearnerStore.open(root)
        reader.verify()
        seen.add((reader.digest, _holds_secret(root)))
        assert reader.digest in (old, new)
        is_new = reader.digest == new
        LearnerStore.open(root, write=True).close()
        if is_new:  # nobody has to ask again
            assert not _holds_secret(root)
        _forget(root)
        assert LearnerStore.open(root).digest == new and not _holds_secret(root)
        assert "forgetting" not in LearnerStore.open(root).header
        shutil.rmtree(root)
        if not died:
            break
    assert not died and survive > 40
    assert {(old, True), (new, True), (new, False)} <= seen  # killed before, between and after


def test_a_disk_that_does_not_delete_is_told_and_the_next_writer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _learner(tmp_path / "learner")

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(StoreError, match=r"has forgotten, but .* could not be deleted"):
            _forget(root)
    assert _holds_secret(root) and "forgetting" in LearnerStore.open(root).header
    LearnerStore.open(root, write=True).close()
    assert not _holds_secret(root)


def test_a_header_deletes_nothing_outside_of_what_forgetting_writes(tmp_path: Path) -> None:
    root = _learner(tmp_path / "learner")
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "mine").mkdir()
    os.symlink(outside, root / "removed")
    (outside / "file").write_text("mine")
    names = [
        "../outside",
        "mine",
        "learner.json",
        "",
        ".",
        "tasks/../../outside",
        "/etc",
        "removed/file",
        "tasks/001-task-1",
    ]
    with LearnerStore.open(root, write=True) as store:
        store.forget({}, {}, record=RECORD, delete=[*names, json.dumps(3)])
        store.verify()
    assert (outside / "file").is_file() and (root / "mine").is_dir()
