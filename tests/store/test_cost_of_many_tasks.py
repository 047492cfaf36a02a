"""One more task costs the same however many there are: what was read and checked once is not read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from everlora.errors import StoreError
from everlora.store import LearnerStore, digest, layout
from tests.store.builders import add_task, make_learner


def test_the_digest_reads_no_task_twice_and_sees_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = make_learner(tmp_path / "learner", ("a", "b", "c")), []
    plain = layout.read_manifest
    monkeypatch.setattr(
        layout, "read_manifest", lambda root, name, *rest: read.append(name) or plain(root, name, *rest)
    )
    before = LearnerStore.open(folder).digest
    assert LearnerStore.open(folder).digest == before and len(read) == len(set(read)) == 3
    with LearnerStore.open(folder, write=True) as store:
        add_task(store, "d")
    after = LearnerStore.open(folder).digest
    assert after != before and read[3:] == ["tasks/003-d"]
    digest._remembered.cache_clear()
    assert LearnerStore.open(folder).digest == after, "what is remembered is what would be read"
    file = folder / "tasks" / "001-b" / "task.json"
    looks = file.stat()
    file.write_bytes(file.read_bytes().replace(b"label-1", b"label-9"))
    os.utime(file, ns=(looks.st_atime_ns, looks.st_mtime_ns))
    with pytest.raises(StoreError, match=r"task\.json has a wrong checksum"):
        _ = LearnerStore.open(folder).digest


def test_a_list_of_tasks_is_written_out_once_to_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = make_learner(tmp_path / "learner", ("a", "b")), []
    plain = layout._sealed
    monkeypatch.setattr(layout, "_sealed", lambda body: written.append(1) or plain(body))
    LearnerStore.open(folder)
    assert not written, "this process wrote it"
    layout._KNOWN.clear()
    for _ in range(3):
        LearnerStore.open(folder)
    assert len(written) == 1
    path: Any = folder / "learner.json"
    path.write_bytes(path.read_bytes().replace(b'"name": "a"', b'"name": "x"'))
    with pytest.raises(StoreError, match="wrong checksum"):
        LearnerStore.open(folder)
