"""What one process does in `test_hundred_tasks`: learn a hundred tasks in one directory while being killed at random.

Beside it another fork learns the same tasks undisturbed. The learners are then opened anew, and their files weighed.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.store import LearnerStore
from everlora.store.layout import LEARNER_FILE
from everlora.streams import Examples
from tests.durability.killing import fork, kill_after, kill_once, look, run
from tests.tiny_models import save_tiny
from tests.toy import toy_images, toy_learner

TASKS, ROWS, RANK, WIDTH, LAYERS = 100, 6, 2, 64, 2
OPENINGS = 5
# so few directions of each task that a hundred of them find room
OPTIONS: dict[str, dict[str, Any]] = {"inflora": {"threshold_start": 0.9, "horizon": TASKS}}
# a fork lives at most so long, in which some tasks are finished; after the last kill it learns on to the end
LONGEST_SECONDS, MOST_KILLS = 5.0, 40


def rows_of(task: int) -> Examples:
    return toy_images([f"{task} left", f"{task} right"], ROWS, seed=task + 1)


def learn(path: Path, method: str, model: Path) -> None:
    """Make a learner where there is none, and learn the tasks that it lacks, with a checkpoint at each step."""
    if not (path / LEARNER_FILE).exists():
        options = OPTIONS.get(method, {})
        toy_learner(path, model, method, device="cpu", checkpoint_every=1, epochs=1, rank=RANK, **options)
    learner = Learner.open(path, device="cpu")
    for task in range(len(learner.tasks), TASKS):
        learner.learn(rows_of(task), name=f"task {task}")


def weigh(path: Path) -> list[dict[str, Any]]:
    """Bytes of each task's folder, how many directions it protected, and what learning it cost."""
    store, occupied, found = LearnerStore.open(path), 0, []
    for entry in store.tasks:
        task = store.read_task(entry.index)
        ranks = task.record["panels"].get("occupied_rank", {})
        before, occupied = occupied, int(sum(ranks.values()))
        found.append(
            {
                "bytes": sum(file.stat().st_size for file in (path / entry.folder).rglob("*") if file.is_file()),
                "directions": occupied - before,
                "seconds": task.record["cost"]["seconds"]["total"],
            }
        )
    return found


def openings(path: Path, log: Path) -> list[list[float]]:
    """Seconds of opening a learner, each time in a fork that has opened none before: of the processor, and in all."""

    def opened() -> None:
        start, busy = time.monotonic(), time.process_time()
        Learner.open(path, device="cpu")
        with log.open("a") as seconds:
            seconds.write(f"{time.process_time() - busy} {time.monotonic() - start}\n")

    for _ in range(OPENINGS):
        run(opened, log.with_name("openings.log"))
    return [[float(number) for number in line.split()] for line in log.read_text().splitlines()]


def main(place: Path, seed: int, method: str) -> None:
    """Learn, be killed, and print what came of it as one line of JSON."""
    assert torch.get_num_threads() == 1, "a fork of a process with more threads may hang"
    model = save_tiny("vit", place / "model", hidden_size=WIDTH, num_hidden_layers=LAYERS)
    load_backbone(model)
    random, moments = Random(f"{seed} {method}"), Counter[str]()
    whole, parts, log = place / "whole", place / "parts", place / "log"
    undisturbed = fork(lambda: learn(whole, method, model), place / "whole.log")
    for _ in range(MOST_KILLS):
        if not kill_once(lambda: learn(parts, method, model), log, random, LONGEST_SECONDS):
            break
        moments[look(parts)] += 1
    run(lambda: learn(parts, method, model), log)
    assert not kill_after(undisturbed, None, place / "whole.log")
    found = {
        "method": method,
        "kills": moments.total(),
        "moments": moments,
        "digests": [LearnerStore.open(path).digest for path in (parts, whole)],
        "opening": openings(parts, place / "seconds"),
        "tasks": weigh(parts),
        "states": sorted(path.name for path in (parts / "state").iterdir()),
        "left over": sorted(path.name for path in parts.iterdir()),
        "index bytes": (parts / LEARNER_FILE).stat().st_size,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
