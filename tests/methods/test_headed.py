"""Heads of statistics and cosine heads, mixed into methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from everlora import Learner
from everlora.errors import DataError, OptionError, UnsupportedError
from everlora.store import LearnerStore
from everlora.streams import concatenate
from tests.export.builders import readme_code
from tests.toy import tiny_model, toy_learner, toy_tasks, toy_texts
from tests.training.courses import Course

STATISTICAL = ("ncm", "lda", "ridge", "ridge_random_features")
SHARED = ("inflora", "sd_lora", "o_lora", "sequential", "replay", "lwf", "ewc", "probe", "ncm")
ISOLATED = ("pnn", "packnet", "senacnn", "convlora", "independent")
TASKS = toy_tasks("text", 3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def _learner(path: Path, model: Path, method: str, head: str, **options: Any) -> Learner:
    return toy_learner(path, model, method, head=head, head_features=40, device="cpu", **options)


def _learn(learner: Learner, tasks: list[Any] | None = None) -> Learner:
    for rows in (tasks or TASKS)[len(learner.tasks) :]:
        learner.learn(rows)
    return learner


def _scores(learner: Learner) -> np.ndarray:
    answers = learner.predict(concatenate(TASKS))
    return np.array([[answer.scores[name] for name in learner.classes] for answer in answers])


@pytest.mark.parametrize("method", [*(pytest.param(name, marks=pytest.mark.slow) for name in SHARED[1:]), "inflora"])
@pytest.mark.parametrize(
    "head", [*(pytest.param(name, marks=pytest.mark.slow) for name in STATISTICAL[::2]), "ridge", "cosine"]
)
def test_every_method_with_every_head_goes_on_after_reopening(
    method: str, head: str, bert: Path, tmp_path: Path
) -> None:
    if head == "cosine" and method == "ncm":
        with pytest.raises(UnsupportedError, match="leave head out"):
            _learner(tmp_path / "learner", bert, method, head)
        return
    whole = _learn(_learner(tmp_path / "whole", bert, method, head, head_drift="linear"))
    parts = _learner(tmp_path / "parts", bert, method, head, head_drift="linear")
    for rows in TASKS:
        parts.learn(rows)
        parts = Learner.open(tmp_path / "parts", device="cpu")
    assert parts.digest == whole.digest and np.array_equal(_scores(parts), _scores(whole))
    whole.rollback(2)
    assert _learn(whole).digest == parts.digest


def test_a_frozen_encoder_with_ridge_is_ridge_on_its_features(bert: Path, tmp_path: Path) -> None:
    learner = _learn(_learner(tmp_path / "learner", bert, "probe", "ridge", head_penalty=1e-2))
    rows = concatenate(TASKS)
    batch = learner.backbone.collate(learner.backbone.encode(rows.inputs), torch.arange(len(rows)))
    with torch.no_grad():
        features = learner.backbone.eval().features(batch).double().numpy()
    features = np.c_[features, np.ones(len(features))]
    labels = np.array([learner.classes.index(name) for name in rows.labels])
    theirs = Ridge(alpha=1e-2 * np.square(features).sum(axis=0).mean(), fit_intercept=False)
    theirs.fit(features, np.eye(len(learner.classes))[labels])
    expected = (features @ theirs.coef_.T).argmax(axis=1)
    assert [learner.classes.index(answer.label) for answer in learner.predict(rows)] == expected.tolist()


@pytest.mark.parametrize("method", ["probe", "inflora", "sd_lora"])
def test_cosine_heads_start_from_class_means(method: str, bert: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", bert, method, "cosine", lr=1e-12, head_lr=1e-12)
    rows = TASKS[0]
    learner.learn(rows)
    batch = learner.backbone.collate(learner.backbone.encode(rows.inputs), torch.arange(len(rows)))
    with torch.no_grad():
        unit = torch.nn.functional.normalize(learner.backbone.eval().features(batch).double(), dim=1)
    means = [unit[torch.tensor([label == name for label in rows.labels])].mean(dim=0) for name in learner.classes]
    scores = 16 * unit @ torch.nn.functional.normalize(torch.stack(means), dim=1).T
    found = [[answer.scores[name] for name in learner.classes] for answer in learner.predict(rows)]
    torch.testing.assert_close(torch.tensor(found).double(), scores.softmax(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [*STATISTICAL, "cosine"])
def test_tasks_of_one_class_in_any_order_give_one_head(head: str, bert: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    answers = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        learner = _learner(tmp_path / str(order), bert, "probe", head)
        _learn(learner, [toy_texts([names[place]], 10, seed=place) for place in order])
        found = learner.predict(toy_texts(names, 5, seed=9))
        answers.append(np.array([[answer.scores[name] for name in names] for answer in found]))
    assert np.allclose(answers[0], answers[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["ridge", "cosine"])
def test_a_method_that_adapts_learns_tasks_of_one_class(head: str, bert: Path, tmp_path: Path) -> None:
    tasks = [toy_texts([name], 10, seed=place) for place, name in enumerate("abc")]
    learner = _learn(_learner(tmp_path / "learner", bert, "inflora", head), tasks)
    assert learner.evaluate(concatenate(tasks)).accuracy > 0.5
    with pytest.raises(DataError, match="head=ridge"):
        toy_learner(tmp_path / "linear", bert, "inflora").learn(tasks[0])


@pytest.mark.parametrize("method", ISOLATED)
def test_networks_of_their_own_are_refused(method: str, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a network for each task"):
        _learner(tmp_path / "learner", bert, method, "ridge")
    with pytest.raises(UnsupportedError, match="leave feature_layers out"):
        toy_learner(tmp_path / "learner", bert, method, feature_layers=2)
    assert not (tmp_path / "learner").exists()


def test_wrong_options_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'head' of the head"):
        _learner(tmp_path / "learner", bert, "inflora", "rigde")
    with pytest.raises(OptionError, match="head_penalty"):
        _learner(tmp_path / "learner", bert, "inflora", "ridge", head_penalty=0)


def test_how_far_features_moved_is_said(bert: Path, tmp_path: Path) -> None:
    learner = _learn(_learner(tmp_path / "learner", bert, "sequential", "ridge", head_drift="measure"), TASKS[:2])
    moved = learner.method.panels()["head_drift"]
    assert moved["moved"] > 0 and moved["explained"] <= 1
    plain = _learn(_learner(tmp_path / "plain", bert, "sequential", "ridge"), TASKS[:2])
    assert np.array_equal(_scores_of(plain), _scores_of(learner)), "measuring changes nothing"
    assert "head_drift" not in plain.method.panels()


def _scores_of(learner: Learner) -> np.ndarray:
    return np.array([list(answer.scores.values()) for answer in learner.predict(TASKS[0])])


@pytest.mark.parametrize("head", ["ridge", "ncm", "cosine", "ridge_random_features"])
def test_exports_give_the_learners_scores(
    head: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _learn(_learner(tmp_path / "learner", bert, "inflora", head), TASKS[:2])
    learner.export(tmp_path / "merged", format="merged")
    _check_export(tmp_path / "merged", learner, list(learner.classes), monkeypatch)


def _check_export(folder: Path, learner: Learner, classes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the README has these classes, and gives them the learner's scores."""
    rows = toy_texts(["class a", "class b"], 4, seed=7)
    expected = [[answer.scores[name] for name in classes] for answer in learner.predict(rows)]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(readme_code(folder)[0], "README.md", "exec"), names)
    found = torch.softmax(names["score"](list(rows.inputs)), dim=1)
    assert names["classes"] == classes and torch.allclose(found, torch.tensor(expected), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ridge", "ncm", "cosine"])
def test_a_task_that_is_cut_off_ends_with_the_same_bits(head: str, bert: Path, tmp_path: Path) -> None:
    options = {"head_drift": "none" if head == "cosine" else "linear", "eval_batch_size": 6}
    whole = _learn(_learner(tmp_path / "whole", bert, "inflora", head, **options), TASKS[:2])
    parts = _learn(_learner(tmp_path / "parts", bert, "inflora", head, checkpoint_every=1, **options), TASKS[:1])
    assert len(parts.tasks) == 1
    course = Course(places=[("train", 2, "after"), ("end", 2, "after"), ("begin", 1, "after")])
    learner = course.run(tmp_path / "parts", lambda learner: learner.learn(TASKS[1]))
    assert len(course.met) == 3 and learner.digest == whole.digest


@pytest.mark.parametrize("place", [2, 6])
def test_a_task_without_training_that_is_cut_off_keeps_all_rows(place: int, bert: Path, tmp_path: Path) -> None:
    whole = _learn(_learner(tmp_path / "whole", bert, "ncm", "ridge", eval_batch_size=6), TASKS[:2])
    parts = _learner(tmp_path / "parts", bert, "ncm", "ridge", checkpoint_every=1, eval_batch_size=6)
    _learn(parts, TASKS[:1])
    course = Course(places=[("end", place, "after")])
    learner = course.run(tmp_path / "parts", lambda learner: learner.learn(TASKS[1]))
    assert len(course.met) == 1 and learner.digest == whole.digest


@pytest.mark.parametrize("head", STATISTICAL)
def test_a_forgotten_class_is_never_the_answer(
    head: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _learn(_learner(tmp_path / "learner", bert, "probe", head), TASKS[:2])
    gone = learner.classes[0]
    report = learner.forget(label=gone)
    again = Learner.open(tmp_path / "learner", device="cpu")
    assert all(answer.scores.get(gone, 0.0) == 0.0 for answer in again.predict(TASKS[0]))
    assert any("Gram matrix" in sentence for sentence in report.remaining) == (head != "ncm"), report
    again.export(tmp_path / "merged", format="merged")
    _check_export(tmp_path / "merged", again, [name for name in learner.classes if name != gone], monkeypatch)


@pytest.mark.parametrize("head", ["lda", "ncm"])
def test_a_class_that_came_with_another_task_too_stays_and_that_is_said(head: str, bert: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", bert, "probe", head, scenario="domain_incremental")
    for seed, name in enumerate(("one", "two")):
        learner.learn(toy_texts(["a", "b"], 6, seed=seed), name=name)
    report = learner.forget(task="one")
    assert Learner.open(tmp_path / "learner", device="cpu").method.head.counts().tolist() == [12, 12]
    assert any("came with another task, too" in sentence for sentence in report.remaining)
    assert not any("Gram matrix" in sentence for sentence in report.remaining)


def test_an_older_learner_has_the_head_it_was_made_with(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", bert, "inflora")
    header = LearnerStore.open(tmp_path / "learner").header
    assert header["options"]["head"]["head"] == "linear" and learner.settings.head.head == "linear"
    parts = {name: part for name, part in learner.settings.as_parts().items() if name != "head"}
    assert type(learner.settings).from_parts(learner.settings.method, parts) == learner.settings


@pytest.mark.parametrize("method", [*(pytest.param(name, marks=pytest.mark.slow) for name in SHARED[1:-2]), "inflora"])
def test_after_the_tasks_to_adapt_to_nothing_but_the_head_changes(method: str, bert: Path, tmp_path: Path) -> None:
    whole = _learner(tmp_path / "whole", bert, method, "ridge", adapt_tasks=1)
    other = _learner(tmp_path / "other", bert, method, "ridge", adapt_tasks=1)
    _learn(whole)
    for rows in (TASKS[0], TASKS[2], TASKS[1]):  # the head does not know the order of what follows
        other.learn(rows)
        other = Learner.open(tmp_path / "other", device="cpu")
    costs = [task["cost"] for task in whole.card()["tasks"]]
    assert [cost["trainable_parameters"] > 0 for cost in costs] == [True, False, False]
    assert [cost["steps"] > 0 for cost in costs] == [True, False, False]
    shared = [whole.classes.index(name) for name in other.classes]
    theirs = np.array([[a.scores[name] for name in other.classes] for a in other.predict(concatenate(TASKS))])
    assert np.allclose(_scores(whole)[:, shared], theirs, atol=1e-4)
    digest = whole.digest
    whole.rollback(2)
    assert _learn(whole).digest == digest


def test_a_head_that_is_trained_must_go_on_adapting(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="head=ridge"):
        _learner(tmp_path / "learner", bert, "inflora", "linear", adapt_tasks=1)
