"""A run that is cut off within a task goes on there, and its figures are those of one that was not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner, run
from everlora.errors import InterruptedLearning, OptionError
from everlora.training.interruption import answering, ask, forget, stop_if_asked
from tests.training.courses import Course, Killed


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    forget()


@pytest.fixture
def start(recipe_file: Path, network: Path, splits: Any, tmp_path: Path) -> Any:
    def go(out: str, **changes: Any) -> dict[str, Any]:
        given = {"data": splits, "model": network, "seeds": [3], "methods": ["inflora", "joint"], **changes}
        return run(recipe_file, out=tmp_path / out, **given)

    return go


def _correct(results: dict[str, Any]) -> list[Any]:
    return [one["correct"] for one in results["runs"]]


def test_a_run_goes_on_within_a_task(start: Any, tmp_path: Path) -> None:
    whole = start("whole")
    for place in (("train", 3, "after"), ("train", 5, "after")):
        with Course(places=[place])._armed(), pytest.raises(Killed):
            start("parts", checkpoint_every=1)
    assert list(tmp_path.glob("parts/*/learner/checkpoint/*"))
    course = Course(places=[])
    with course._armed():
        parts = start("parts", checkpoint_every=1)
    assert _correct(parts) == _correct(whole) and course.steps < 12
    for row in ("inflora-3", "joint-3"):
        one, other = (Learner.open(tmp_path / out / row / "learner").digest for out in ("whole", "parts"))
        assert one == other
    assert json.loads((tmp_path / "parts" / "plan.json").read_text())["saving"] == {"checkpoint_every": "1"}


def test_an_unfinished_task_is_put_aside_when_asked(start: Any, tmp_path: Path) -> None:
    with Course(places=[("train", 1, "after")])._armed(), pytest.raises(Killed):
        start("out", methods=["inflora"], checkpoint_every="1")
    start("out", methods=["inflora"], discard_unfinished=True)
    assert list(tmp_path.glob("out/inflora-3/learner/removed/0000/checkpoint/*/checkpoint.json"))
    with pytest.raises(OptionError, match="300s"):
        start("other", checkpoint_every="often")
    assert not (tmp_path / "other").exists()


def test_a_stop_between_two_tasks(start: Any) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "InfLoRA, seed 3" and done == 1:
            ask()

    with pytest.raises(InterruptedLearning):
        start("out", methods=["inflora"], progress=progress)
    forget()
    assert _correct(start("out", methods=["inflora"])) == _correct(start("whole", methods=["inflora"]))


@pytest.mark.slow
def test_workers_are_asked_too(recipe_file: Path, network: Path, tmp_path: Path) -> None:
    given = {"model": network, "seeds": [3, 4], "methods": ["inflora"], "workers": 2, "options": {"epochs": 3}}

    def progress(stage: str, done: int, total: int) -> None:
        if "train" in stage and done > 2:
            ask()

    with answering(), pytest.raises(InterruptedLearning, match="was stopped as asked"):
        run(recipe_file, out=tmp_path / "parts", progress=progress, **given)
    assert list(tmp_path.glob("parts/*/learner/checkpoint/*/checkpoint.json"))
    with pytest.raises(InterruptedLearning):
        stop_if_asked()
    forget()
    parts = run(recipe_file, out=tmp_path / "parts", **given)
    assert _correct(parts) == _correct(run(recipe_file, out=tmp_path / "whole", **given))
