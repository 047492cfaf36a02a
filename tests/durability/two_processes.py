"""What each of two processes does in `test_two_processes`; started by torchrun with a folder and a model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from everlora import Learner
from everlora.errors import EverloraError
from everlora.store import newest_checkpoint
from everlora.training import processes
from tests.toy import toy_learner, toy_tasks

LEARNERS: dict[str, dict[str, Any]] = {
    "replay": {"size": 8, "insert": "online", "keep_validation": 2},
    "inflora": {"micro_batches": 2},
    "lwf": {"warmup_epochs": 1},
}
_BREAKS_AT_STEP = 3


def _fail_in_time(learner: Learner) -> None:
    """Let a step fail in this process, after some that were saved."""
    loss, calls = learner.method.loss, []

    def failing(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > _BREAKS_AT_STEP:
            raise EverloraError("the lamp went out")
        return loss(batch)

    learner.method.loss = failing  # type: ignore[method-assign]


def main(folder: Path, model: Path) -> None:
    group = processes("cpu")
    assert group.size == 2 == distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    results = {}
    for name, options in LEARNERS.items():
        tasks = toy_tasks("image", 2)
        whole = toy_learner(folder / f"{name}-whole", model, name, device="cpu", **options)
        parts = toy_learner(folder / f"{name}-parts", model, name, device="cpu", checkpoint_every=1, **options)
        for learner in (whole, parts):
            learner.learn(tasks[0], name="first")
        whole.learn(tasks[1], name="second")
        if group.rank == 1:
            _fail_in_time(parts)
        try:
            parts.learn(tasks[1], name="second")
            seen = "nothing"
        except EverloraError as error:
            seen = str(error)
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
