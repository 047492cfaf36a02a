"""The figures of a run that trackers get after each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everlora.experiments.plan import Plan
from everlora.learner import Learner
from everlora.tracking import Trackers

__all__ = ["moment_figures", "open_trackers"]

FOLDER = "tracking"


@contextmanager
def open_trackers(plan: Plan, row: str, seed: int, *, learner: Learner, out: Path) -> Iterator[Trackers | None]:
    """Have the plan's trackers at hand for one row and seed inside a `with` block; None where it names none."""
    if not plan.track:
        yield None
        return
    settings = {**learner.settings.as_parts(), "recipe": plan.recipe.name, "row": row, "seed": seed}
    steps = sum(int(task["cost"]["steps"]) for task in learner.card()["tasks"])
    name = f"{plan.recipe.name}-{row}-{seed}"
    with Trackers(plan.track, name=name, folder=out / FOLDER, settings=settings, steps=steps) as trackers:
        yield trackers


def moment_figures(values: Mapping[str, Any], names: Sequence[str], index: int) -> dict[str, float]:
    """Return what was measured on the test sets after task `index`: accuracy, or nats a token of a language model.

    Args:
        values: of the run's record.
        names: of the stream's tasks.
        index: the moment.
    """
    if "language" in values:
        stages = [stage for stage in values["language"]["stages"] if stage["task"] == index]
        cells = stages[0]["measured"][0]["tests"] if stages else []
        kind, pairs = "nats a token", [(cell["nll"], cell["tokens"]) if cell else None for cell in cells]
    else:
        row = values["correct"][index]
        kind, pairs = "accuracy", [None if c is None else (c, n) for c, n in zip(row, values["sizes"], strict=True)]
    found = {name: pair[0] / pair[1] for name, pair in zip(names, pairs, strict=False) if pair is not None and pair[1]}
    mean = {f"{kind}/mean of tasks": sum(found.values()) / len(found)} if found else {}
    return mean | {f"{kind}/{name}": value for name, value in found.items()}
