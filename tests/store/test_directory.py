from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from everlora.errors import LockedError, StoreError
from everlora.store import LearnerStore
from everlora.store.layout import slug
from tests.store.builders import HEADER, add_task, make_learner, snapshot


def test_a_learner_round_trips(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "deep" / "intents", ("January 2026!", "Февраль"))
    store = LearnerStore.open(folder)
    assert store.header == HEADER and not store.is_writable
    assert [(task.index, task.name, task.folder) for task in store.tasks] == [
        (0, "January 2026!", "tasks/000-january-2026"),
        (1, "Февраль", "tasks/001-task"),
    ]
    task = store.read_task(1)
    assert task.record["labels"] == ["label-1"]
    assert task.files == ("adapter_config.json", "adapter_model.safetensors", "log.jsonl", "stable/added.safetensors")
    assert np.array_equal(task.arrays("adapter_model.safetensors")["down"], np.array([[1, 2, 3], [4, 5, 6]]))
    assert task.arrays("stable/added.safetensors")["bias"].tolist() == [1.0, 1.0]
    assert task.document("adapter_config.json") == {"r": 2}
    assert task.log() == [{"step": 1, "loss": 0.5, "seconds": 1.0}]
    arrays, values = store.read_state()
    assert arrays["magnitudes"].tolist() == [0.5, 0.5] and values == {"num_seen": 2}
    assert store.read_state(0)[1] == {"num_seen": 1}
    store.verify()


def test_finished_folders_never_change(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    before = {name: data for name, data in snapshot(folder).items() if name.startswith("tasks/")}
    with LearnerStore.open(folder, write=True) as store:
        add_task(store, "february")
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before


def test_the_file_ends_with_its_own_sha256(tmp_path: Path) -> None:
    text = (make_learner(tmp_path / "learner") / "learner.json").read_text()
    assert list(json.loads(text))[-1] == "sha256"


def test_states_are_kept_as_asked(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    newest = make_learner(tmp_path / "newest", names)
    everything = make_learner(tmp_path / "all", names, keep_states="all")
    assert sorted(path.name for path in (newest / "state").iterdir()) == ["002", "003"]
    assert sorted(path.name for path in (everything / "state").iterdir()) == ["000", "001", "002", "003"]
    assert not (newest / "removed").exists()
    assert LearnerStore.open(everything).read_state(0)[1] == {"num_seen": 1}
    with pytest.raises(StoreError, match="no longer keeps its state after the first 1 tasks"):
        LearnerStore.open(newest).read_state(0)


def test_no_learner_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        for write in (False, True):
            with pytest.raises(StoreError, match=r"no learner in .*; create one with `everlora init"):
                LearnerStore.open(path, write=write)
    assert list(tmp_path.iterdir()) == []


def test_create_refuses_a_folder_that_holds_a_learner(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    before = snapshot(folder)
    with pytest.raises(StoreError, match="holds a learner already"):
        LearnerStore.create(folder, HEADER)
    assert snapshot(folder) == before


def test_create_refuses_a_file_and_a_learner_without_its_index(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match="is a file; a learner needs a folder"):
        LearnerStore.create(tmp_path / "file", HEADER)
    folder = make_learner(tmp_path / "learner")
    (folder / "learner.json").unlink()
    with pytest.raises(StoreError, match=r"has a folder 'tasks' but no learner\.json"):
        LearnerStore.create(folder, HEADER)
    assert (folder / "tasks" / "000-january" / "task.json").is_file()


def test_create_leaves_other_files_alone_and_refuses_a_header_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"learner\.json can hold plain JSON values only"):
        LearnerStore.create(tmp_path, {"options": {"rank": np.int64(2)}})
    with pytest.raises(StoreError, match="keep_states is 'three'"):
        LearnerStore.create(tmp_path, HEADER, keep_states="three")  # type: ignore[arg-type]
    LearnerStore.create(tmp_path, HEADER).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    value = json.loads((folder / "learner.json").read_text())
    (folder / "learner.json").write_text(json.dumps({**value, "format_version": 2, "tasks": "arranged otherwise"}))
    with pytest.raises(StoreError, match="format version 2, and this everlora reads up to 1; upgrade"):
        LearnerStore.open(folder)


@pytest.mark.parametrize("folder_name", ["../elsewhere", "/etc", "tasks/../../x", "tasks/000-a/..", "state/000"])
def test_an_index_that_leads_outside_is_refused(folder_name: str, tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    value = json.loads((folder / "learner.json").read_text())
    value["tasks"][0]["folder"] = folder_name
    (folder / "learner.json").write_text(json.dumps(value))
    with pytest.raises(StoreError, match=r"which is not one that everlora writes inside the learner"):
        LearnerStore.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": None},
        {"header": []},
        {"keep_states": 3},
        {"tasks": [{"index": 0}]},
        {"tasks": [{"index": 1, "name": "a", "folder": "tasks/000-a", "sha256": ""}]},
        {"states": [{"index": 5, "folder": "state/005", "sha256": ""}]},
    ],
)
def test_an_index_of_another_shape_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    value = json.loads((folder / "learner.json").read_text())
    (folder / "learner.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(StoreError, match="lacks a field or has one of the wrong type"):
        LearnerStore.open(folder)


def test_a_task_folder_that_is_a_link_outside_is_refused(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    (folder / "tasks" / "000-january").rename(tmp_path / "moved")
    (folder / "tasks" / "000-january").symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match="link that leaves the folder"):
        LearnerStore.open(folder).read_task(0)


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "cut":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


FILES = [
    "learner.json",
    "tasks/000-january/task.json",
    "tasks/000-january/adapter_model.safetensors",
    "tasks/000-january/adapter_config.json",
    "tasks/000-january/stable/added.safetensors",
    "tasks/000-january/log.jsonl",
    "state/000/state.json",
    "state/000/arrays.safetensors",
]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_named(name: str, how: str, tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    assert set(snapshot(folder)) == set(FILES)  # a new kind of file needs its row above
    _damage(folder / name, how)
    with pytest.raises(StoreError) as caught:
        LearnerStore.open(folder).verify()
    assert Path(name).name in str(caught.value)


def test_every_single_bit_of_the_index_is_covered(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    path = folder / "learner.json"
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytes([data[position] ^ (1 << position % 7)])
        path.write_bytes(data[:position] + flipped + data[position + 1 :])
        with pytest.raises(StoreError):
            LearnerStore.open(folder)
    path.write_bytes(data)
    LearnerStore.open(folder)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tasks/000-january/task.json", "tasks/001-february/task.json"),
        ("tasks/000-january/adapter_model.safetensors", "tasks/001-february/adapter_model.safetensors"),
        ("tasks/000-january", "tasks/001-february"),
        ("state/000/state.json", "state/001/state.json"),
        ("state/000", "state/001"),
    ],
)
def test_swapped_files_are_found(first: str, second: str, tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner", ("january", "february"))
    (folder / first).rename(tmp_path / "aside")
    (folder / second).rename(folder / first)
    (tmp_path / "aside").rename(folder / second)
    with pytest.raises(StoreError, match=r"wrong checksum|are expected: it was cut short or changed"):
        LearnerStore.open(folder).verify()


def test_unlisted_names_and_numbers_are_refused(tmp_path: Path) -> None:
    store = LearnerStore.open(make_learner(tmp_path / "learner"))
    with pytest.raises(StoreError, match=r"lists no file 'x\.json'; it has adapter_config\.json"):
        store.read_task(0).document("x.json")
    for index in (1, -2):
        with pytest.raises(StoreError, match="1 tasks"):
            store.read_task(index)
        with pytest.raises(StoreError, match="1 tasks"):
            store.read_state(index)


@pytest.mark.parametrize(
    ("arrays", "documents", "message"),
    [
        ({"../x.safetensors": {}}, {}, "leaves the folder"),
        ({}, {"task.json": {}}, "one file name twice"),
        ({"x": {}}, {"x": {}}, "one file name twice"),
        ({"x.safetensors": {"w": np.array(["a"])}}, {}, "expected a NumPy array of numbers"),
        ({}, {"x.json": {"value": float("nan")}}, "can hold plain JSON values only"),
    ],
)
def test_a_task_that_cannot_be_stored_changes_nothing(
    arrays: dict[str, dict[str, np.ndarray]], documents: dict[str, dict[str, object]], message: str, tmp_path: Path
) -> None:
    with LearnerStore.create(tmp_path / "learner", HEADER) as store:
        before = snapshot(store.root)
        with pytest.raises(StoreError, match=message):
            store.write_task(
                "bad", record={}, arrays=arrays, documents=documents, state_arrays={}, state_values={}, log=[]
            )
        assert snapshot(store.root) == before and store.tasks == ()
        add_task(store, "good")
        store.verify()


def test_a_log_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with LearnerStore.create(tmp_path / "learner", HEADER) as store, pytest.raises(StoreError, match=r"log\.jsonl"):
        store.write_task(
            "a", record={}, arrays={}, documents={}, state_arrays={}, state_values={}, log=[{"loss": float("nan")}]
        )


def test_the_digest_ignores_clocks_logs_and_where_the_base_lies(tmp_path: Path) -> None:
    digests = set()
    for number, seconds in enumerate((1.0, 2.0)):
        header = {**HEADER, "base_model": f"/models/{number}", "created": str(number)}
        with LearnerStore.create(tmp_path / str(number), header) as store:
            add_task(store, "january", seconds=seconds)
            digests.add(store.digest)
            store.set_base_model("/elsewhere")
        reopened = LearnerStore.open(tmp_path / str(number))
        assert reopened.header["base_model"] == "/elsewhere"
        digests.add(reopened.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("part", ["header", "name", "record", "arrays", "documents", "state_arrays", "state_values"])
def test_the_digest_sees_everything_else(part: str, tmp_path: Path) -> None:
    def digest(folder: Path, changed: str) -> str:
        def value(name: str) -> int:
            return 1 if name == changed else 0

        with LearnerStore.create(folder, {**HEADER, "options": {"rank": value("header")}}) as store:
            store.write_task(
                f"task {value('name')}",
                record={"labels": [str(value("record"))]},
                arrays={"x.safetensors": {"w": np.array([value("arrays")])}},
                documents={"x.json": {"r": value("documents")}},
                state_arrays={"m": np.array([value("state_arrays")])},
                state_values={"seen": value("state_values")},
            )
            return store.digest

    assert digest(tmp_path / "a", "nothing") != digest(tmp_path / "b", part)


def test_the_digest_grows_with_tasks_and_returns_after_a_rollback(tmp_path: Path) -> None:
    with LearnerStore.create(tmp_path / "learner", HEADER) as store:
        digests = [store.digest]
        for name in ("a", "b"):
            add_task(store, name)
            digests.append(store.digest)
        assert len(set(digests)) == 3
        store.rollback(1)
        assert store.digest == digests[1]
        add_task(store, "b")
        assert store.digest == digests[2]


def test_rollback_keeps_everything_in_removed(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner", ("a", "b", "c"), keep_states="all")
    before = snapshot(folder)
    with LearnerStore.open(folder, write=True) as store:
        assert [task.name for task in store.rollback(1)] == ["b", "c"]
        assert [task.name for task in store.tasks] == ["a"]
        assert store.rollback(1) == ()
    after = snapshot(folder)
    for name, data in before.items():
        stays = name.startswith(("tasks/000", "state/000"))
        assert after[name if stays else f"removed/0000/{name}"] == data
    with LearnerStore.open(folder, write=True) as store:
        add_task(store, "b again")
        store.rollback(0)
        assert store.tasks == () and store.read_task  # an empty learner stays usable
        add_task(store, "first")
        store.verify()
    assert (folder / "removed" / "0001" / "tasks" / "001-b-again").is_dir()
    assert set(snapshot(folder)) > {f"removed/0000/{name}" for name in before if "/001" in name or "/002" in name}


def test_rollback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with LearnerStore.open(make_learner(tmp_path / "learner", ("a", "b", "c")), write=True) as store:
        before = snapshot(store.root)
        for number in (-1, 4, True):
            with pytest.raises(StoreError, match="cannot go back to"):
                store.rollback(number)
        with pytest.raises(StoreError, match="no longer keeps its state after the first 1 tasks"):
            store.rollback(1)
        assert snapshot(store.root) == before


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    store = LearnerStore.open(make_learner(tmp_path / "learner"))
    for action in (lambda: add_task(store, "b"), lambda: store.rollback(0), lambda: store.set_base_model("x")):
        with pytest.raises(StoreError, match="open for reading only"):
            action()


def test_reading_takes_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    (folder / ".lock").unlink(missing_ok=True)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in folders}
    for path in folders:
        path.chmod(0o555)
    try:
        store = LearnerStore.open(folder)
        store.verify()
        assert store.digest
        assert {path: path.stat().st_mtime_ns for path in folders} == before
        if os.geteuid() != 0:  # root may write anywhere
            with pytest.raises(StoreError, match="cannot be opened for writing"):
                LearnerStore.open(folder, write=True)
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_second_writer_in_this_process_is_refused(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    with LearnerStore.open(folder, write=True):
        with pytest.raises(LockedError, match="being written to by another process"):
            LearnerStore.open(folder, write=True)
        LearnerStore.open(folder).verify()  # readers are welcome meanwhile
    with LearnerStore.open(folder, write=True) as store:
        store.close()
        store.close()
        LearnerStore.open(folder, write=True).close()


def test_a_second_writer_in_another_process_is_refused(tmp_path: Path) -> None:
    folder = make_learner(tmp_path / "learner")
    program = (
        "import sys; from everlora.store import LearnerStore; from everlora.errors import LockedError\n"
        "try: LearnerStore.open(sys.argv[1], write=True)\n"
        "except LockedError: sys.exit(7)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with LearnerStore.open(folder, write=True):
        assert subprocess.run(command, check=False).returncode == 7
    assert subprocess.run(command, check=False).returncode == 0


def test_a_full_disk_is_one_sentence_and_leaves_the_learner_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with LearnerStore.open(make_learner(tmp_path / "learner"), write=True) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match="No space left on device; the learner is as it was before"):
                add_task(store, "b")
        assert len(store.tasks) == 1
        add_task(store, "b")
        store.verify()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("January", "january"), ("Été à Paris", "ete-a-paris"), ("../../etc", "etc"), ("", "task"), ("日本", "task")],
)
def test_slugs_are_plain_names(name: str, expected: str) -> None:
    assert slug(name) == expected
    assert len(slug(name * 50)) <= 40
