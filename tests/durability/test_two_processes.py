"""Two processes that fail together go on together, from what the first of them saved."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import everlora
from everlora.store import LearnerStore, newest_checkpoint
from tests.durability.two_processes import LEARNERS, PASSES
from tests.toy import tiny_model

REPOSITORY = Path(everlora.__file__).parents[1]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ROWS = "\n".join(f"{'lost parcel red' if i % 2 else 'my card is blue'},{'ab'[i % 2]}" for i in range(24))


def _launch(
    *words: object, folder: Path = REPOSITORY, meanwhile: Callable[[int], None] | None = None
) -> tuple[int, str, str]:
    """Let torchrun start a module in two processes; return its exit code, its output and its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [*LAUNCHER, *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes) as started:
        try:
            if meanwhile is not None:
                meanwhile(started.pid)
            printed, errors = started.communicate(timeout=900)
        except BaseException:
            os.killpg(started.pid, signal.SIGKILL)  # the launcher alone would leave its processes behind
            raise
    return started.returncode, printed, errors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    code, _, errors = _launch("tests.durability.two_processes", folder, tiny_model("vit", folder / "vit"))
    assert code == 0, errors
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(results: list[dict[str, Any]]) -> None:
    first, second = results
    for name in LEARNERS:
        assert first[name]["digests"] == second[name]["digests"]
        whole, resumed = first[name]["digests"]
        assert whole == resumed, name
        assert "process 1 of 2 failed" in first[name]["seen"] and second[name]["seen"] == "the lamp went out"
        assert first[name]["saved"] == second[name]["saved"] > 0
        rows = 20 if name == "replay" else 24
        assert first[name]["saved"] + first[name]["trained"] == 2 * -(-rows // 8), "only the first process reports"
        assert second[name]["trained"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", PASSES)
def test_two_processes_go_on_within_a_pass(stage: str, results: list[dict[str, Any]]) -> None:
    first, second = (result["passes"][stage] for result in results)
    assert first["digests"][0] == first["digests"][1] == second["digests"][0] == second["digests"][1]
    assert "process 1 of 2 failed" in first["seen"] and second["seen"] == "the lamp went out"
    assert first["place"] == second["place"] == [stage, 4]
    assert first["parts"] == ["gathered", "gathered-1"], "what either process had summed up"
    assert first["again"] == [6] and second["again"] == [], "four of six batches lay behind; the first process reports"


def _ranks(launcher: int) -> dict[int, int]:
    """Process ids of what a launcher started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(entry.removeprefix(b"RANK=")) for entry in entries if entry.startswith(b"RANK=")]
        found |= {rank: int(child) for rank in ranks}
    return found


def _checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint/[0-9]*")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_process_that_is_killed_ends_the_others_and_the_same_command_goes_on(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path / "base")
    (tmp_path / "rows.csv").write_text("text,label\n" + ROWS)
    options = ["--set", "rank=2", "--set", "epochs=30", "--set", "batch_size=8", "--set", "eval_batch_size=4"]
    for name in ("whole", "parts"):
        code, _, errors = _launch(
            *("everlora", "init", name, "--model", "base", "--method", "inflora", *options), folder=tmp_path
        )
        assert code == 0, errors
    code, printed, errors = _launch("everlora", "learn", "whole", "rows.csv", "--json", folder=tmp_path)
    assert code == 0, errors
    assert json.loads(printed)["steps"] == 90, "one document, from the first process"
    words = ("everlora", "learn", "parts", "rows.csv", "--checkpoint-every", "4", "--json")
    for rank in (1, 0):
        before = _checkpoints(tmp_path / "parts")

        def kill(launcher: int, rank: int = rank, before: Any = before) -> None:
            deadline = time.monotonic() + 600
            while _checkpoints(tmp_path / "parts") <= before and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(_ranks(launcher)[rank], signal.SIGKILL)

        begun = time.monotonic()
        code, _, errors = _launch(*words, folder=tmp_path, meanwhile=kill)
        assert code != 0 and time.monotonic() - begun < 600
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        # the launcher ends the other process, too, which may hear of that first
        sentences = f"process {1 - rank} of 2 lost the connection|interrupted; what a learner|stopped as asked"
        assert len(said) == 1 and re.search(sentences, said[0]), errors
        assert not re.search(r"File .*/everlora/", errors), "the launcher alone shows where it was"
        assert not LearnerStore.open(tmp_path / "parts").tasks
        assert newest_checkpoint(tmp_path / "parts") is not None
    code, printed, errors = _launch(*words, folder=tmp_path)
    assert code == 0, errors
    assert len({LearnerStore.open(tmp_path / name).digest for name in ("whole", "parts")}) == 1
    assert not (tmp_path / "parts" / "checkpoint").exists()
