"""Directories of older formats: kept ones, and a made-up newer format that the present one is migrated to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from everlora.errors import StoreError
from everlora.store import FORMAT_VERSION, LearnerStore, layout
from everlora.store.migrations import MIGRATIONS, Migration
from tests.store.builders import HEADER, add_task, make_learner, snapshot

FIXTURES = Path(__file__).parent / "fixtures"


def test_every_version_has_a_fixture_and_a_way_on() -> None:
    assert sorted(path.name for path in FIXTURES.glob("version_*")) == [
        f"version_{number}" for number in range(1, FORMAT_VERSION + 1)
    ]
    assert sorted(MIGRATIONS) == list(range(1, FORMAT_VERSION))
    for folder in FIXTURES.glob("version_*"):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 50_000


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_kept_directory_opens_answers_as_it_did_and_goes_on(version: int, tmp_path: Path) -> None:
    from everlora import Learner
    from everlora.doctor import examine
    from tests.toy import toy_texts

    fixture = FIXTURES / f"version_{version}"
    expected = json.loads((fixture / "expected.json").read_text())
    folder = tmp_path / "learner"
    shutil.copytree(fixture / "learner", folder)
    before = snapshot(folder)

    learner = Learner.open(folder, model=fixture / "base")
    answers = learner.predict(expected["asked"])
    assert [one.label for one in answers] == [one["label"] for one in expected["answers"]]
    for found, wanted in zip(answers, expected["answers"], strict=True):
        assert found.scores == pytest.approx(wanted["scores"], abs=1e-5)
    assert [found for found in examine(folder, model=fixture / "base") if found.severity == "broken"] == []
    assert snapshot(folder) == before, "reading changes nothing"
    if version == FORMAT_VERSION:
        assert learner.digest == expected["digest"]

    result = learner.learn(toy_texts(["refund", "card"], 8, seed=9), name="later")
    assert (result.index, result.known_labels, result.new_labels) == (2, ("refund",), ("card",))
    assert set(result.metrics) == {"task 0", "task 1", "later"}
    after = snapshot(folder)
    assert {name: after[name] for name in before if name.startswith("tasks/")} == {
        name: data for name, data in before.items() if name.startswith("tasks/")
    }
    again = Learner.open(folder, model=fixture / "base")
    assert len(again.tasks) == 3 and len(again.predict(expected["asked"])) == 4


@pytest.fixture
def next_format(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A newer format that calls two things by other names; the list says which kinds of file were migrated."""
    seen: list[str] = []

    def index(value: dict[str, Any]) -> dict[str, Any]:
        seen.append("index")
        header = {("technique" if key == "method" else key): item for key, item in value["header"].items()}
        return {**value, "header": header}

    def manifest(value: dict[str, Any]) -> dict[str, Any]:
        seen.append("manifest")
        if "record" in value:
            names = value["record"]["labels"]
            return {**value, "record": {**value["record"], "labels": [name.upper() for name in names]}}
        return {**value, "values": {"count": value["values"]["num_seen"]}}

    monkeypatch.setattr(layout, "FORMAT_VERSION", FORMAT_VERSION + 1)
    monkeypatch.setitem(MIGRATIONS, FORMAT_VERSION, Migration(index, manifest))
    return seen


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_learner(tmp_path / "learner", ("january", "february"))


def test_reading_migrates_in_memory_alone(old: Path, next_format: list[str]) -> None:
    before = snapshot(old)
    store = LearnerStore.open(old)
    assert store.header["technique"] == "some_method" and "method" not in store.header
    assert store.read_task(1).record["labels"] == ["LABEL-1"]
    assert store.read_state()[1] == {"count": 2}
    store.verify()
    assert snapshot(old) == before and {"index", "manifest"} <= set(next_format)


def test_opening_for_writing_migrates_the_index_once_and_keeps_the_old_one(old: Path, next_format: list[str]) -> None:
    before = snapshot(old)
    with LearnerStore.open(old, write=True) as store:
        digest = store.digest
        assert store.header["technique"] == "some_method"
    after = snapshot(old)
    assert json.loads(after["learner.json"])["format_version"] == FORMAT_VERSION + 1
    assert after["removed/0000/learner.json"] == before["learner.json"]
    assert {name: data for name, data in after.items() if name.startswith(("tasks", "state"))} == {
        name: data for name, data in before.items() if name.startswith(("tasks", "state"))
    }, "manifests stay as they were written"
    next_format.clear()
    with LearnerStore.open(old, write=True) as store:
        assert store.digest == digest and "index" not in next_format
        add_task(store, "march")
    assert not (old / "removed" / "0001").exists()
    written = json.loads((old / "tasks" / "002-march" / "task.json").read_text())
    assert written["format_version"] == FORMAT_VERSION + 1
    assert LearnerStore.open(old).read_task(2).record["labels"] == ["label-2"], "a new manifest is not migrated"
    assert LearnerStore.open(old).read_task(0).record["labels"] == ["LABEL-0"]


def test_a_damaged_old_index_is_refused_before_it_is_migrated(old: Path, next_format: list[str]) -> None:
    path = old / "learner.json"
    path.write_bytes(path.read_bytes().replace(b"january", b"janxary"))
    with pytest.raises(StoreError, match="wrong checksum"):
        LearnerStore.open(old)
    assert next_format == []


@pytest.mark.parametrize("version", [0, -1, 1.5, "one", None, [1]])
def test_versions_that_never_were_are_refused(version: object, old: Path) -> None:
    value = json.loads((old / "learner.json").read_text())
    (old / "learner.json").write_text(json.dumps({**value, "format_version": version}))
    with pytest.raises(StoreError, match=r"which everlora never wrote|wrong checksum"):
        LearnerStore.open(old)


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "FORMAT_VERSION", 7)
    with LearnerStore.create(tmp_path / "learner", HEADER) as store:
        add_task(store, "a")
    monkeypatch.undo()
    path = tmp_path / "learner" / "learner.json"
    index = json.loads(path.read_text())
    index.pop("sha256")
    path.write_bytes(layout._sealed({**index, "format_version": FORMAT_VERSION}))
    with pytest.raises(StoreError, match=r"task\.json has format version 7, and this everlora reads up to"):
        LearnerStore.open(tmp_path / "learner").read_task(0)
