"""What the doctor finds in learner directories, and what a repair does to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from everlora import Learner
from everlora.cli import main
from everlora.doctor import examine, repair
from everlora.errors import LockedError, StoreError
from everlora.store import LearnerStore, write_checkpoint
from tests.durability.damage import change_arrays, flip, reseal
from tests.store.builders import snapshot
from tests.toy import tiny_model, toy_learner, toy_tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a learner of three tasks in one folder."""
    place = tmp_path_factory.mktemp("made")
    model = tiny_model("bert", place / "base")
    learner = toy_learner(place / "learner", model, "inflora", epochs=1, keep_validation=2)
    for number, task in enumerate(toy_tasks("text", 3)):
        learner.learn(task, name=f"task {number}")
    return place


@pytest.fixture
def base(made: Path) -> Path:
    return made / "base"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "learner", tmp_path / "learner"))


def broken(folder: Path, **options: object) -> list[str]:
    """The findings of broken things, as lines."""
    found = examine(folder, **{"base": False, **options})  # type: ignore[arg-type]
    return [str(one) for one in found if one.severity == "broken"]


def lines(folder: Path) -> list[str]:
    return [str(one) for one in examine(folder, base=False)]


def test_a_whole_learner_has_no_findings_and_is_not_touched(folder: Path) -> None:
    before = snapshot(folder)
    assert examine(folder) == []
    assert snapshot(folder) == before
    done = repair(folder)
    assert (done.moved, done.kept_tasks, done.findings) == ((), None, [])
    assert snapshot(folder) == before


def test_the_quick_checks_need_no_torch(folder: Path) -> None:
    program = (
        "import sys; from everlora.doctor import examine\n"
        "assert examine(sys.argv[1], base=False) == [] and 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, cwd=root)


def test_no_learner_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreError, match="no learner in"):
        examine(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no learner" in capsys.readouterr().err


def test_a_lost_index_is_said(folder: Path) -> None:
    (folder / "learner.json").unlink()
    assert broken(folder) == ["broken: learner.json is missing; restore it from a backup"]
    assert repair(folder, base=False).moved == ()


def test_a_newer_format_is_said(folder: Path) -> None:
    path = folder / "learner.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    assert broken(folder) == [
        "broken: learner.json has format version 99, and this everlora reads up to 1; upgrade everlora"
    ]


def test_the_base_model_is_hashed_anew(folder: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    assert examine(folder, model=other) == []
    weights = other / "model.safetensors"
    status = weights.stat()
    weights.write_bytes(flip(weights.read_bytes(), -1))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # a cache by size and time would not notice
    [found] = broken(folder, base=True, model=other)
    assert "another base model than the one at" in found and "--model" in found
    [found] = [str(one) for one in examine(folder, model=tmp_path / "nowhere")]
    assert found.startswith("warning: learner.json") and "cannot be checked" in found


def test_strays_are_found_and_moved_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    planted = {
        "tasks/000-task-0/adapter_model.bin": "broken",
        "state/001/notes.txt": "broken",
        "tasks/other/file": "broken",
        "tasks/007-later/task.json": "warning",
        "tasks/.003-next.tmp-01234567/added.safetensors": "warning",
        "state/000/state.json": "warning",
        ".learner.json.tmp-89abcdef": "warning",
        "notes.txt": "note",
        "docs/mine.txt": "note",
    }
    for name in planted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("planted")
    (tmp_path / "outside").write_text("secret")
    (folder / "tasks" / "000-task-0" / "link.json").symlink_to(tmp_path / "outside")
    (folder / "tasks" / "000-task-0" / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(folder / "tasks" / "000-task-0" / "pipe")
    found = {one.file: one.severity for one in examine(folder, base=False)}
    for name, severity in planted.items():
        assert any(name == file or name.startswith(f"{file}/") for file in found if found[file] == severity), name
    assert found["tasks/000-task-0/link.json"] == found["tasks/000-task-0/pipe"] == "broken"
    done = repair(folder)
    assert len(done.moved) == 9 and not [one for one in done.findings if one.severity != "note"]
    after = snapshot(folder)
    assert {name: data for name, data in after.items() if not name.startswith(("removed/", "notes", "docs"))} == before
    for name, severity in planted.items():
        assert (folder / ("" if severity == "note" else "removed/0000") / name).read_text() == "planted"
    assert (tmp_path / "outside").read_text() == "secret" and repair(folder).moved == ()


def test_a_damaged_earlier_state_is_given_up(folder: Path) -> None:
    (folder / "state" / "001" / "arrays.safetensors").write_bytes(b"short")
    [found] = broken(folder)
    assert found.startswith("broken: state/001/arrays.safetensors has 5 bytes where")
    assert repair(folder).moved == ("state/001",)
    assert broken(folder) == [] and LearnerStore.open(folder).states[0].index == 2
    assert (folder / "removed" / "0000" / "state" / "001" / "arrays.safetensors").read_bytes() == b"short"
    assert len(Learner.open(folder).tasks) == 3
    assert any("one cannot go back to there" in line for line in lines(folder))


@pytest.mark.parametrize("name", ["tasks/002-task-2/added.safetensors", "state/002/state.json"])
def test_a_damaged_newest_task_is_gone_back_from_when_asked(name: str, folder: Path) -> None:
    before = snapshot(folder)
    (folder / name).write_bytes(flip(before[name], 60))
    with pytest.raises(StoreError):
        Learner.open(folder)
    assert any("was whole after its first 2 tasks" in line and "--go-back" in line for line in lines(folder))
    done = repair(folder)
    assert done.moved == () and done.kept_tasks is None and any(one.severity == "broken" for one in done.findings)
    done = repair(folder, go_back=True)
    assert (done.moved, done.kept_tasks) == (("tasks/002-task-2", "state/002"), 2)
    assert not [one for one in done.findings if one.severity != "note"]
    assert [task.name for task in Learner.open(folder).tasks] == ["task 0", "task 1"]
    kept = set(snapshot(folder).values())
    assert {data for file, data in before.items() if file not in (name, "state/000/state.json")} <= kept


def test_there_is_no_way_back_past_the_states_that_are_kept(folder: Path) -> None:
    (folder / "tasks" / "000-task-0" / "added.safetensors").unlink()
    assert not any("--go-back" in line for line in lines(folder))
    assert repair(folder, go_back=True, base=False).kept_tasks is None
    assert broken(folder) == ["broken: tasks/000-task-0/added.safetensors is missing; restore it from a backup"]


def _replace(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        key = next(key for key in sorted(arrays) if key.endswith(name))
        arrays[key] = np.ascontiguousarray(change(arrays[key]))

    return apply


def _without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(arrays: dict[str, np.ndarray]) -> None:
        del arrays[next(key for key in sorted(arrays) if key.endswith(name))]

    return apply


ODD_TENSORS = [
    ("adapter_model.safetensors", _without("lora_A.weight"), "expected both factors"),
    ("adapter_model.safetensors", _replace("lora_A.weight", lambda a: a[:1]), "do not fit each other"),
    ("adapter_model.safetensors", _replace("lora_B.weight", lambda a: a[:-1]), "where an earlier task has"),
    ("adapter_model.safetensors", _replace("lora_A.weight", lambda a: a.astype(np.int64)), "floating-point"),
    ("adapter_model.safetensors", _replace("lora_A.weight", lambda a: a * np.nan), "not finite"),
    ("added.safetensors", _replace("head/weight", lambda a: a[:1]), "1 rows in 'head/weight' for 2 classes"),
    ("added.safetensors", _replace("head/weight", lambda a: a[:, :3]), "3 features, where an earlier task has 16"),
    ("added.safetensors", _replace("head/bias", lambda a: a[:1]), "'head/bias' of shape"),
    ("validation.safetensors", _replace("texts.ends", lambda a: a + 1), "do not end where their bytes do"),
    ("validation.safetensors", _replace("ids", lambda a: a[:1]), "columns of different lengths"),
]


@pytest.mark.parametrize(("name", "change", "message"), ODD_TENSORS)
def test_tensors_that_cannot_be_are_found_behind_right_checksums(
    name: str, change: Callable[[dict[str, np.ndarray]], None], message: str, folder: Path
) -> None:
    change_arrays(folder / "tasks" / "001-task-1" / name, change)
    reseal(folder)
    assert any(message in line and f"tasks/001-task-1/{name}" in line for line in broken(folder)), lines(folder)


def test_ranks_and_layers_that_do_not_agree(folder: Path, base: Path) -> None:
    config = folder / "tasks" / "000-task-0" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 7}))
    for number in range(3):
        weights = folder / "tasks" / f"00{number}-task-{number}" / "adapter_model.safetensors"
        change_arrays(weights, _replace("key.lora_B.weight", lambda a: a[:-1]))
    reseal(folder)
    found = "\n".join(broken(folder, base=True))
    assert "names the rank 7 for layer" in found and "for a weight of shape (16, 16)" in found


def test_broken_checkpoints_are_passed_over_and_can_be_moved(folder: Path) -> None:
    for step in range(2):
        write_checkpoint(folder, task={"index": 3, "name": "x"}, values={"step": step}, arrays={"w": np.ones(3)})
    assert examine(folder, base=False) == []
    newest = folder / "checkpoint" / "000002" / "arrays.safetensors"
    newest.write_bytes(flip(newest.read_bytes(), -1))
    [found] = lines(folder)
    assert found.startswith("warning: checkpoint/000002 is broken and is passed over")
    assert repair(folder).moved == ("checkpoint/000002",)
    assert examine(folder, base=False)[0].severity == "note"
    assert (folder / "checkpoint" / "000001").is_dir()


def test_a_lock_that_is_held_is_said_and_respected(folder: Path) -> None:
    (folder / "tasks" / ".003-next.tmp-01234567").mkdir()
    lock = FileLock(folder / ".lock", thread_local=False)
    with lock:
        assert any("being written to by another process" in line for line in lines(folder))
        assert {one.severity for one in examine(folder, base=False)} == {"note"}
        with pytest.raises(LockedError):
            repair(folder)
    assert {one.severity for one in examine(folder, base=False)} == {"warning"}


def test_the_verb_prints_one_line_each_and_says_by_its_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(folder)]) == 0
    assert "is whole" in capsys.readouterr().out
    (folder / "tasks" / "002-task-2" / "log.jsonl").unlink()
    (folder / "tasks" / "002-task-2" / "planted.bin").write_bytes(b"")
    assert main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and printed.err == ""
    assert "or leave it: the learner needs no log" in printed.out
    assert main(["doctor", str(folder), "--repair", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["moved"] == ["tasks/002-task-2/planted.bin"] and not report["ok"]
    assert [(one["severity"], one["file"]) for one in report["findings"]] == [
        ("broken", "tasks/002-task-2/log.jsonl"),
        ("note", "removed"),
    ]
    (folder / "tasks" / "002-task-2" / "task.json").unlink()
    assert main(["doctor", str(folder), "--repair", "--go-back"]) == 0
    assert "is as it was after 2 tasks." in capsys.readouterr().out
    assert main(["doctor", str(folder), "--go-back"]) == 2
    assert "goes with --repair" in capsys.readouterr().err


def test_options_this_version_does_not_know_are_said(folder: Path) -> None:
    path = folder / "learner.json"
    body = json.loads(path.read_text())
    body["header"]["options"]["method"]["colour"] = "red"
    path.write_text(json.dumps(body))
    reseal(folder)
    [found] = broken(folder, base=True)
    assert "colour" in found and "open it with the version that wrote it" in found


def test_what_is_to_be_forgotten_is_not_kept_in_removed(folder: Path) -> None:
    path = folder / "learner.json"
    body = json.loads(path.read_text())
    body["header"]["forgetting"] = ["state/000"]
    path.write_text(json.dumps(body))
    reseal(folder)
    (folder / "state" / "000").mkdir()
    (folder / "state" / "000" / "arrays.safetensors").write_bytes(b"secret")
    [found] = lines(folder)
    assert found.startswith("warning: state/000 holds what was to be forgotten")
    assert repair(folder, base=False).moved == () and not (folder / "removed").exists()
