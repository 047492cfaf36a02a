"""What each of two processes does in `test_two_processes`; started by torchrun with a folder and a model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from everlora import Learner
from everlora.errors import EverloraError
from everlora.store import newest_checkpoint
from everlora.training import Processes, processes
from everlora.training.checkpoint import Saver
from tests.toy import toy_learner, toy_tasks

LEARNERS: dict[str, dict[str, Any]] = {
    "replay": {"size": 8, "insert": "online", "keep_validation": 2},
    "inflora": {"micro_batches": 2},
    "lwf": {"warmup_epochs": 1},
}
PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "inputs before training": ("inflora", {}),
    "inputs after training": ("inflora", {}),
    "fisher information": ("ewc", {"fisher_samples": 20}),
    "class means": ("ncm", {}),
}
"""Passes that break, of 24 rows in six batches and so three rounds of two processes, after two rounds."""
_BREAKS_AT_STEP = 3


def _fail_after(calls: int, hook: Any) -> Any:
    """A hook that fails after some calls."""
    left = [calls]

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise EverloraError("the lamp went out")
        return hook(*args)

    return failing


def _fails(learner: Learner, task: Any, what: str, *, breaks: bool) -> str:
    """Learn a task in which this process fails, if it breaks, in a step or a pass; return what was said of it."""
    with pytest.MonkeyPatch.context() as patch:
        if breaks and what == "step":
            patch.setattr(learner.method, "loss", _fail_after(_BREAKS_AT_STEP, learner.method.loss))
        elif breaks:
            enter = Saver.after_batch
            count: list[int] = []

            def after_batch(saver: Saver, name: str, batches: int, rows: int) -> None:
                enter(saver, name, batches, rows)
                count.extend([batches] if name == what else [])
                if len(count) == 2:
                    raise EverloraError("the lamp went out")

            patch.setattr(Saver, "after_batch", after_batch)
        try:
            learner.learn(task, name="second")
        except EverloraError as error:
            return str(error)
    return "nothing"


def break_passes(folder: Path, model: Path, group: Processes) -> dict[str, Any]:
    """Passes in which the second process fails, and which are gone on with."""
    results = {}
    for number, (stage, (name, options)) in enumerate(PASSES.items()):
        tasks = toy_tasks("image", 2)
        options = {"eval_batch_size": 4, "epochs": 1, **options}
        whole, parts = (
            toy_learner(folder / f"{kind}-{number}", model, name, device="cpu", checkpoint_every=every, **options)
            for kind, every in (("whole", 0), ("parts", 1))
        )
        for learner in (whole, parts):
            learner.learn(tasks[0], name="first")
        whole.learn(tasks[1], name="second")
        seen = _fails(parts, tasks[1], stage, breaks=group.rank == 1)
        found = newest_checkpoint(parts.path)
        group.check()  # neither goes on before the other has looked
        places: list[tuple[str, int]] = []
        again = Learner.open(parts.path, device="cpu")
        again.learn(tasks[1], name="second", progress=lambda at, done, total, places=places: places.append((at, done)))
        results[stage] = {
            "seen": seen,
            "place": None if found is None else [found.values.get("pass", [0, ""])[1], found.values.get("batches")],
            "parts": sorted({key.partition("/")[0] for key in found.arrays if "gathered" in key}) if found else [],
            "again": [done for at, done in places if at == stage],
            "digests": [whole.digest, again.digest],
        }
    return results


def main(folder: Path, model: Path) -> None:
    group = processes("cpu")
    assert group.size == 2 == distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {"passes": break_passes(folder, model, group)}
    for name, options in LEARNERS.items():
        tasks = toy_tasks("image", 2)
        whole = toy_learner(folder / f"{name}-whole", model, name, device="cpu", **options)
        parts = toy_learner(folder / f"{name}-parts", model, name, device="cpu", checkpoint_every=1, **options)
        for learner in (whole, parts):
            learner.learn(tasks[0], name="first")
        whole.learn(tasks[1], name="second")
        seen = _fails(parts, tasks[1], "step", breaks=group.rank == 1)
        found = newest_checkpoint(parts.path)
        group.check()  # neither goes on before the other has looked
        steps: list[str] = []
        again = Learner.open(parts.path, device="cpu")
        again.learn(tasks[1], name="second", progress=lambda stage, done, total, steps=steps: steps.append(stage))
        results[name] = {
            "seen": seen,
            "saved": 0 if found is None else len(found.arrays["training/step_seconds"]),
            "trained": sum(stage.startswith("train") for stage in steps),
            "digests": [whole.digest, again.digest],
        }
    (folder / f"result-{group.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
