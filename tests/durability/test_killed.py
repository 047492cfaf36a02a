"""A process killed with SIGKILL at random moments, over all methods: what goes on from there gives the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from everlora.store import LearnerStore
from tests.durability.killing import ENVIRONMENT, look, outcomes
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs a system that waits for processes by descriptor"),
]

PARENTS = 2
AT_LEAST = 60
THROUGH_THE_PROGRAM, KILLS_OF_EACH = ("inflora", "replay"), 5


def test_every_method(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = [(seed, part, PARENTS) for part in range(PARENTS)]
    found = outcomes("tests.durability.killed_methods", tmp_path, *shares)
    kills, learners = (sum(one[key] for one in found) for key in ("kills", "learners"))
    moments = sum((Counter(one["moments"]) for one in found), Counter())
    problems = [f"{one['case']}: {one['problem']}" for one in found if one["problem"]]
    with capsys.disabled():
        ending = "all digests equal" if not problems else f"{len(problems)} methods with problems"
        print(f"\nkilled {kills} times at random moments (seed {seed}), {dict(moments)}:")
        print(f"{learners} learners of {len(found)} methods and presets went on to the end, {ending}")
    assert not problems, "\n".join(problems)
    assert kills >= AT_LEAST and all(one["kills"] >= 1 for one in found)
    assert sum(moments[stage] for stage in ("begin", "train", "end")) > kills / 4, "checkpoints had their part"


def _program(*words: object, folder: Path) -> str:
    command = [sys.executable, "-m", "everlora", *map(str, words)]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _learn(learner: Path) -> tuple[object, ...]:
    return ("learn", learner, "data.csv", "--checkpoint-every", 1)


def _killed(seconds: float, learner: Path, folder: Path) -> bool:
    """Let the program learn, and kill it after so long; whether it was alive then."""
    command = [sys.executable, "-m", "everlora", *map(str, _learn(learner))]
    said = folder / f"{learner.name}.log"
    with said.open("wb") as errors:
        started = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=errors, stderr=errors)
    try:
        started.wait(seconds)
    except subprocess.TimeoutExpired:
        started.kill()
    code = started.wait()
    assert code in (0, -signal.SIGKILL), said.read_text()
    return code != 0


def _digest(learner: Path) -> str:
    return str(json.loads(_program("status", learner, "--json", folder=learner.parent))["digest"])


def kill_the_program(method: str, random: Random, folder: Path) -> tuple[Counter[str], int]:
    """Kill the program while it learns, until enough kills have hit; return where they hit, and how many learners."""
    options = ("--model", "base", "--method", method, "--set", "batch_size=8", "--set", "epochs=120")
    whole, made = folder / f"{method}-whole", folder / f"{method}-made"
    _program("init", whole, *options, folder=folder)
    shutil.copytree(whole, made)
    start = time.monotonic()
    _program(*_learn(whole), folder=folder)
    seconds = time.monotonic() - start
    digest, learners = _digest(whole), 0
    moments: Counter[str] = Counter()
    while moments.total() < KILLS_OF_EACH or not moments["train"]:
        parts = Path(shutil.copytree(made, folder / f"{method}-parts-{learners}"))
        learners += 1
        for _ in range(KILLS_OF_EACH):
            if not _killed(random.uniform(0, seconds), parts, folder):
                break
            moments[look(parts)] += 1
            if LearnerStore.open(parts).tasks:
                break  # killed after the task was written, but before the program had ended: the next would be another
        if not LearnerStore.open(parts).tasks:
            _program(*_learn(parts), folder=folder)
        assert _digest(parts) == digest
    return moments, learners


def test_the_program(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("bert", tmp_path / "base")
    rows = [f"{'lost parcel red' if row % 2 else 'my card is blue'},{'ab'[row % 2]}" for row in range(24)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    with ThreadPoolExecutor(len(THROUGH_THE_PROGRAM)) as pool:
        started = [
            pool.submit(kill_the_program, method, Random(f"{seed} {method}"), tmp_path)
            for method in THROUGH_THE_PROGRAM
        ]
        found = [one.result() for one in started]
    moments = sum((counted for counted, _ in found), Counter())
    with capsys.disabled():
        print(f"\nthe program was killed {moments.total()} times at random moments (seed {seed}), {dict(moments)}:")
        print(f"{sum(learners for _, learners in found)} learners went on to the end, all digests equal")
    assert moments.total() >= 10
