"""Several processes: two of them, started by torchrun, do what one does, and fail together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import everlora
from everlora import Learner
from everlora.errors import EverloraError
from everlora.snapshot import join_state
from everlora.store import LearnerStore
from everlora.training import Processes, device_of_process, processes
from everlora.training.processes import _packed, _unpacked
from tests.toy import tiny_model
from tests.training.builders import save_language_model
from tests.training.worker import LANGUAGE_LEARNERS, LEARNERS, learn_all, train_double

REPOSITORY = Path(everlora.__file__).parents[1]


def _run(what: str, folder: Path, model: Path = Path()) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.worker", what, str(folder), str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, errors = started.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the launcher alone would leave its processes behind
            raise
    done = subprocess.CompletedProcess(command, started.returncode, "", errors)
    files = [folder / f"result-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    results = [json.loads(file.read_text()) for file in files]
    assert [result["size"] for result in results] == [2, 2], "two processes, and not one twice"
    return done, results


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = processes("cpu")
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
    values = torch.ones(2)
    assert alone.sum(values) is values and alone.sum_gradients([], 1.5) == 1.5
    assert alone.gather({"a": values, "b": 3}) == [{"a": values, "b": 3}]
    batches = [torch.tensor([number]) for number in range(5)]
    assert alone.own(batches) == batches
    assert [len(Processes(rank, 2).own(batches)) for rank in range(2)] == [3, 2]
    with pytest.raises(EverloraError, match="wet"), alone.together():
        raise EverloraError("wet")
    assert device_of_process("cuda") == "cuda" and device_of_process("cpu") == "cpu"


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of_process(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_an_error_that_all_know_is_not_told_twice() -> None:
    group = Processes(1, 2)
    group._known = EverloraError("known")
    try:
        try:
            raise group._known
        except EverloraError as error:
            raise ValueError("in other words") from error
    except ValueError as error:
        assert group._is_known(error) and not group._is_known(ValueError("new"))


@pytest.mark.slow
def test_one_process_does_not_import_accelerate() -> None:
    code = (
        "import sys, everlora, everlora.training; from everlora.training import processes; processes('cpu');"
        "sys.exit('accelerate.state' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, cwd=REPOSITORY).returncode == 0


def test_a_state_survives_the_way_to_another_process() -> None:
    state = {
        "a/b": torch.eye(3)[1],
        "empty": torch.empty(0, 2),
        "half": torch.ones(2).bfloat16(),
        "n": [1, {"x": None}],
    }
    back = _unpacked(_packed(state))
    assert back.keys() == state.keys() and back["n"] == state["n"]
    for name in ("a/b", "empty", "half"):
        assert back[name].dtype == state[name].dtype and torch.equal(back[name], state[name])


@pytest.mark.slow
def test_each_process_goes_through_some_batches_and_none_counts_twice(tmp_path: Path) -> None:
    _, results = _run("pass", tmp_path)
    one, two = (result["result"] for result in results)
    assert (len(one["visited"]), len(two["visited"])) == (12, 9)
    assert sorted(one["visited"] + two["visited"]) == list(range(21)) and one["seen"] == two["seen"] == 21
    assert one["first"] == [0, 1, 2, 3] and two["first"] == []
    parts = [{"rows": part["visited"], "size": len(part["visited"]), "own": bool(part["first"])} for part in (one, two)]
    assert one["parts"] == two["parts"] == parts


@pytest.mark.slow
def test_the_program_in_two_processes_writes_and_prints_once(tmp_path: Path) -> None:
    rows = [
        f"{words},{label}" for words, label in (("lost parcel red", "a"), ("my card is blue", "b")) for _ in range(6)
    ]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "rows-0.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "rows-1.csv").write_text("text,label\n" + "\n".join(f"{row}2" for row in rows))
    done, results = _run("commands", tmp_path, tiny_model("bert", tmp_path / "bert"))
    assert done.returncode == 0, done.stderr
    one, two = (result["result"] for result in results)
    assert [entry["code"] for entry in one] == [0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0], one
    assert [entry["code"] for entry in two] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0], two
    assert [entry["out"] for entry in two] == [""] * 11, "the first process alone prints"
    assert [entry["tasks"] for entry in one] == [entry["tasks"] for entry in two] == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    status, report, forgotten = (json.loads(one[place]["out"]) for place in (3, 4, 8))
    assert status["num_tasks"] == 2 and report["accuracy"] == status["accuracy_now"]
    assert forgotten["left"]["validation_rows"] == 2
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 13
    assert json.loads(one[6]["out"])["max_difference"] < 1e-4 and (tmp_path / "export" / "model.safetensors").exists()
    for place in (7, 9):
        assert "process 0 of 2 failed" in two[place]["err"] and one[place]["err"].startswith("error: ")
        assert len(one[place]["err"].splitlines()) == len(two[place]["err"].splitlines()) == 1
    LearnerStore.open(tmp_path / "learner").verify()
    assert not list(tmp_path.glob("learner/.*tmp*"))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    _, results = _run("double", tmp_path)
    one = train_double(1)
    for micro_batches in (1, 2):
        first, second = (load_file(tmp_path / f"{micro_batches}-{rank}.safetensors") for rank in range(2))
        assert first.keys() == one.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert max(float((one[name] - first[name]).abs().max()) for name in one) < 1e-9
    rows = [result["result"] for result in results]
    assert sum(rows) == 4 * (5 * 4 + 1) and min(rows) > 20, "each trains on a part; a single row goes to one alone"


@pytest.mark.slow
def test_a_learner_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    model = tiny_model("vit", tmp_path / "vit")
    save_language_model(tmp_path / "llama")
    (tmp_path / "two").mkdir()
    _, results = _run("learner", tmp_path / "two", model)
    learn_all(tmp_path / "one", model)
    for name in (*LEARNERS, *LANGUAGE_LEARNERS):
        Learner.open(tmp_path / "two" / name, device="cpu").evaluate_tasks([])
        one, two = (join_state(LearnerStore.open(tmp_path / folder / name)) for folder in ("one", "two"))
        assert one.keys() == two.keys() and not list((tmp_path / "two" / name).glob("removed/*"))
        for key, value in one.items():
            if not isinstance(value, torch.Tensor):
                assert value == two[key]
            elif value.is_floating_point():
                torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(two[key], value), f"{key} of {name}"
        LearnerStore.open(tmp_path / "two" / name).verify()
        digests = [result["result"][name] for result in results]
        assert digests == [Learner.open(tmp_path / "two" / name, device="cpu").digest] * 2


@pytest.mark.slow
def test_a_process_that_fails_stops_all_and_says_why(tmp_path: Path) -> None:
    model = tiny_model("vit", tmp_path / "vit")
    done, results = _run("fail", tmp_path, model)
    zero, one = (result["result"] for result in results)
    own, told = "EverloraError: the disk is full of water", "failed and this one stopped with it; the reason there: "
    assert one[:3] == [own] * 3 and zero[3] == own
    assert zero[:3] == [f"ProcessError: process 1 of 2 {told}{own}"] * 3
    assert one[3] == f"ProcessError: process 0 of 2 {told}{own}"
    assert zero[4].startswith("StoreError") and "holds a learner already" in zero[4]
    assert one[4].startswith("ProcessError: process 0 of 2 failed") and "holds a learner already" in one[4]
    assert done.returncode != 0 and own in done.stderr
