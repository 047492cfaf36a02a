"""SIGTERM and Ctrl-C through the real program: the step is finished, a checkpoint written, one sentence said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from everlora.store import LearnerStore, newest_checkpoint
from tests.tiny_models import save_tiny

ROWS = "\n".join(f"{'lost parcel red' if i % 2 else 'my card is blue'},{'ab'[i % 2]}" for i in range(24))
PROGRAM = [sys.executable, "-m", "everlora"]


def _program(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*PROGRAM, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def _interrupted(signal_number: int, folder: Path, *words: object) -> tuple[int, str]:
    """Run the program until it has written a checkpoint of training, then send it a signal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*PROGRAM, *map(str, words)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as started:
        deadline = time.monotonic() + 900
        while not list(folder.glob("checkpoint/[0-9]*")) and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        started.send_signal(signal_number)
        _, errors = started.communicate(timeout=900)
    return started.returncode, errors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny("bert", tmp_path / "base")
    (tmp_path / "rows.csv").write_text("text,label\n" + ROWS)
    options = ["--set", "rank=2", "--set", "epochs=60", "--set", "batch_size=8", "--set", "eval_batch_size=8"]
    for name in ("whole", "parts"):
        made = _program("init", name, "--model", "base", "--method", "inflora", *options)
        assert made.returncode == 0, made.stderr
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_command_goes_on(number: int, folder: Path) -> None:
    assert _program("learn", "whole", "rows.csv").returncode == 0
    words = ("learn", "parts", "rows.csv", "--checkpoint-every", 5)
    code, errors = _interrupted(number, folder / "parts", *words)
    *progress, sentence = errors.splitlines()
    expected = "error: learning of task 'rows' was stopped as asked, and a checkpoint was written; the same command"
    assert code == 1 and sentence.startswith(expected) and not any("rror" in line for line in progress)
    assert not LearnerStore.open(folder / "parts").tasks
    found = newest_checkpoint(folder / "parts")
    assert found is not None and found.values["stage"] == "train"
    steps = len(found.arrays["training/step_seconds"])
    assert 1 <= steps < 180

    refused = _program("learn", "parts", "rows.csv", "--set", "epochs=2")
    assert refused.returncode == 2 and "--discard-unfinished" in refused.stderr and "Traceback" not in refused.stderr
    again = _program(*words, "--json")
    assert again.returncode == 0, again.stderr
    result: Any = json.loads(again.stdout)
    assert result["steps"] == 180
    digests = [LearnerStore.open(folder / name).digest for name in ("whole", "parts")]
    assert digests[0] == digests[1]
    assert not (folder / "parts" / "checkpoint").exists()


@pytest.mark.slow
def test_an_unfinished_task_can_be_put_aside(folder: Path) -> None:
    wrong = _program("learn", "parts", "rows.csv", "--checkpoint-every", "often")
    assert wrong.returncode == 2 and "0 for never" in wrong.stderr
    code, _ = _interrupted(signal.SIGTERM, folder / "parts", "learn", "parts", "rows.csv", "--checkpoint-every", 5)
    assert code == 1
    done = _program("learn", "parts", "rows.csv", "--name", "other", "--set", "epochs=1", "--discard-unfinished")
    assert done.returncode == 0 and "removed" in done.stderr, done.stderr
    assert [task.name for task in LearnerStore.open(folder / "parts").tasks] == ["other"]
    assert list((folder / "parts" / "removed").glob("*/checkpoint/*/checkpoint.json"))
