"""The table of methods and heads: its page is what its figures give, and its figures are those of real learners."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from everlora import Learner
from everlora.heads import TaskHeads
from everlora.streams import Stream, Task
from tests.toy import tiny_model, toy_learner, toy_tasks

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module


def test_the_page_is_what_the_figures_give(benchmark: Any) -> None:
    page = benchmark("heads_page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.read_results()) == text, "run python benchmarks/heads_page.py"


def test_what_init_takes_is_what_the_figures_say(benchmark: Any) -> None:
    from everlora.methods.catalogue import RECOMMENDED

    page = benchmark("heads_page")
    row, head = page.chosen(page.read_results())
    method, further = benchmark("heads").ROWS[row]
    assert {"method": method, **further, "head": head} == RECOMMENDED


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ncm", "lda", "ridge", "ridge_drift"])
def test_one_training_gives_what_a_learner_of_that_head_gives(head: str, benchmark: Any, tmp_path: Path) -> None:
    heads = benchmark("heads")
    model = tiny_model("bert", tmp_path / "bert")
    rows = toy_tasks("text", 3)
    tasks = tuple(Task(i, f"t{i}", one.classes, one, one) for i, one in enumerate(rows))
    stream = Stream("toy", "class_incremental", tasks, tuple(c for one in rows for c in one.classes), ())
    job = heads.Job("toy", "inflora", "linear", 0)
    shared = toy_learner(tmp_path / "shared", model, "inflora", device="cpu")
    found = heads._learn_and_judge(shared, stream, job)[head]
    drift = "linear" if head.endswith("_drift") else "none"
    own = toy_learner(
        tmp_path / "own", model, "inflora", device="cpu", head=head.removesuffix("_drift"), head_drift=drift
    )
    assert found == [_right(own, task, stream) for task in tasks]


def _right(learner: Learner, task: Task, stream: Stream) -> list[int]:
    learner.learn(task.train, name=task.name)
    counts = learner.evaluate_tasks([(one.index, one.test) for one in stream.tasks[: task.index + 1] if one.test])
    return [one.correct for one in counts]


def test_features_by_the_average_of_tasks(benchmark: Any, tmp_path: Path) -> None:
    heads, ideas = benchmark("heads"), benchmark("heads_ideas")
    learner = toy_learner(tmp_path / "l", tiny_model("bert", tmp_path / "bert"), "sequential", device="cpu")
    average, rows, factors = ideas.AverageOfTasks(learner), toy_tasks("text", 2), []
    for index, one in enumerate(rows):
        learner.learn(one, name=f"t{index}")
        average.add_task()
        factors.append({name: factor.detach().clone() for name, factor in average._factors()})
    newest = heads.features(learner, rows[0])
    with average.in_place():
        assert not torch.allclose(heads.features(learner, rows[0]), newest, atol=1e-4)
        for name, factor in average._factors():
            torch.testing.assert_close(factor, (factors[0][name] + factors[1][name]) / 2)
    assert torch.equal(heads.features(learner, rows[0]), newest)


def test_squared_error_pulls_scores_towards_indicators(benchmark: Any) -> None:
    heads = TaskHeads(3)
    heads.add_task((0,))
    heads.add_task((1, 2))
    rows, labels = torch.tensor([[9.0, 1.0, 0.0], [9.0, 0.0, 3.0]]), torch.tensor([1, 2])
    with benchmark("heads_ideas").squared_loss():
        assert heads.rows_loss(rows, labels).item() == pytest.approx(2.0)
    assert heads.rows_loss(rows, labels).item() != pytest.approx(2.0)
