"""None of these: the confidence by hand, the threshold as a plain quantile of kept rows, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everlora import Learner
from everlora.errors import DataError, OptionError
from everlora.evaluation import Evaluator
from everlora.rejection import FLOOR, KnownRows, confidence, spread
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer
from tests.toy import tiny_model, toy_images, toy_learner, toy_texts

INFINITE = float("inf")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


def _of_tasks(folder: Path, model: Path, **options: Any) -> tuple[Learner, list[Examples]]:
    """A learner of two tasks of two classes, and the 12 rows of each class that it kept."""
    make = toy_images if model.name.startswith("vit") else toy_texts
    learner = toy_learner(folder, model, options.pop("method", "probe"), keep_validation=12, epochs=1, **options)
    kept = [make(names, 12, seed=7 + index) for index, names in enumerate((("a", "b"), ("c", "d")))]
    for index, rows in enumerate(kept):
        learner.learn(make(rows.classes, 12, seed=1 + index), validation=rows, name=f"task {index}")
    return learner, kept


def _scores(learner: Learner, rows: Examples, task: int | None) -> np.ndarray:
    trainer = TaskTrainer(learner.backbone, learner.method, learner.settings.training)
    encoded = learner.backbone.encode(rows.inputs, rows.ids)
    data = TaskData(encoded, torch.zeros(len(rows), dtype=torch.long), torch.as_tensor(rows.ids))
    return Evaluator(trainer, learner.classes).logits(data, None, task).double().numpy()


def _refused(learner: Learner, rows: Examples, share: float, **options: Any) -> np.ndarray:
    return np.array([answer.label is None for answer in learner.predict(rows, none_of_these=share, **options)])


def test_the_confidence_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, -INFINITE, 1.0], [-INFINITE, 7.0, -INFINITE]])
    usual = spread(scores)
    assert usual == pytest.approx((2 / 3 + 4) / 2)
    expected = [1 / (2 / 3 + FLOOR * usual) ** 0.5, 2 / (4 + FLOOR * usual) ** 0.5, 7.0]
    assert confidence(scores, usual) == pytest.approx(expected)
    moved = 10 * scores[:2] - 3
    assert confidence(moved, 100 * usual) == pytest.approx(expected[:2]), "shifted and scaled"
    two = torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    assert np.diff(confidence(two, spread(two))) > 0.1, "two classes still tell sure from unsure"


@pytest.mark.parametrize(
    "head",
    ["linear", "lda", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cosine", "ncm", "ridge"))],
)
def test_the_threshold_is_the_quantile_of_the_kept_rows(head: str, bert: Path, tmp_path: Path) -> None:
    learner, kept = _of_tasks(tmp_path / "learner", bert, head=head, head_features=40)
    scores = np.concatenate([_scores(learner, rows, None) for rows in kept])
    height = scores.max(axis=1) - scores.mean(axis=1)
    variance = scores.var(axis=1)
    sure = height / np.sqrt(variance + FLOOR * variance.mean())
    expected = sure < np.quantile(sure, 0.25)
    found = np.concatenate([_refused(learner, rows, 0.25) for rows in kept])
    assert abs(found.mean() - 0.25) <= 1 / len(sure), "the share that was asked for"
    near = np.abs(sure - np.quantile(sure, 0.25)) < 1e-4  # other batches, other rounding
    assert (found == expected)[~near].all() and expected.any()
    again = Learner.open(tmp_path / "learner")
    assert np.concatenate([_refused(again, rows, 0.25) for rows in kept]).tolist() == found.tolist()


def test_a_refused_row_keeps_its_scores(vit: Path, tmp_path: Path) -> None:
    learner, kept = _of_tasks(tmp_path / "learner", vit, method="inflora")
    plain = learner.predict(kept[0])
    refusing = learner.predict(kept[0], none_of_these=0.5)
    assert {answer.label for answer in refusing} > {None}, "some are refused and some are not"
    for before, after in zip(plain, refusing, strict=True):
        assert (after.score, after.scores) == (before.score, before.scores)
        assert after.label in (None, before.label) and before.label is not None


def test_the_threshold_follows_the_tasks_and_is_taken_once(bert: Path, tmp_path: Path, monkeypatch: Any) -> None:
    learner, _ = _of_tasks(tmp_path / "learner", bert, method="sequential")
    counted: list[int] = []
    of = KnownRows.of
    monkeypatch.setattr(KnownRows, "of", lambda parts: counted.append(sum(map(len, parts))) or of(parts))
    for _ in range(2):
        learner.predict("red card", none_of_these=0.2)
        learner.predict("red card", none_of_these=0.3)
    assert counted == [48]
    learner.learn(toy_texts(["e", "f"], seed=3), validation=toy_texts(["e", "f"], 4, seed=9))
    learner.predict("red card", none_of_these=0.2)
    assert counted == [48, 56]
    learner.rollback(2)
    learner.predict("red card", none_of_these=0.2)
    assert counted == [48, 56, 48]


@pytest.mark.parametrize("method", ["probe", "independent"])
def test_a_given_task_has_a_threshold_of_its_own(method: str, vit: Path, tmp_path: Path) -> None:
    learner, kept = _of_tasks(tmp_path / "learner", vit, method=method)
    for index, rows in enumerate(kept):
        refused = _refused(learner, rows, 0.25, task=index)
        assert abs(refused.mean() - 0.25) <= 1 / len(rows)
        scores = _scores(learner, rows, index)
        gaps = np.abs(scores[:, 2 * index] - scores[:, 2 * index + 1])
        assert gaps[refused].max() <= gaps[~refused].min() + 1e-5, "of two classes the closest calls are refused"
    assert 0 < np.concatenate([_refused(learner, rows, 0.25) for rows in kept]).mean() < 0.5


def test_one_class_alone_is_judged_by_its_score(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", bert, "ncm")
    kept = toy_texts(["a"], 20, seed=5)
    learner.learn(toy_texts(["a"]), validation=kept)
    assert _refused(learner, kept, 0.25).sum() == pytest.approx(5, abs=1)


def test_what_cannot_be_answered_is_said_in_one_sentence(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "none", bert, "ncm")
    learner.learn(toy_texts(["a", "b"]))
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"none keeps no validation rows to take the threshold .*keep_validation=20"
        ):
            learner.predict("red", none_of_these=0.05)
    with pytest.raises(DataError, match="keeps no validation rows of this task"):
        learner.predict("red", task=0, none_of_these=0.05)
    for share in (0.0, 1.0, -0.1, 5, float("nan")):
        with pytest.raises(OptionError, match="between 0 and 1"):
            learner.predict("red", none_of_these=share)
    few = toy_learner(tmp_path / "few", bert, "ncm", keep_validation=5)
    few.learn(toy_texts(["a", "b"]))
    with pytest.raises(DataError, match=r"0.05 needs 100 validation rows or more, .* found 10; .*keep_validation"):
        few.predict("red", none_of_these=0.05)
    assert len(few.predict("red", none_of_these=0.5)) == 1


def test_a_language_model_has_nothing_to_refuse(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories260K"
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", scenario="language", max_steps=1)
    learner.learn([{"text": "Mary had a little lamb."}] * 2)
    with pytest.raises(OptionError, match="writes its answers and has no classes to refuse; leave none_of_these out"):
        learner.predict("Mary", none_of_these=0.05)
