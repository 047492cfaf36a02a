"""Labels of one kind throughout, where their source has kinds; those of a CSV are names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.errors import DataError
from everlora.scenarios.classes import ClassScenario
from tests.toy import tiny_model, toy_learner


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def typed(_folder: Path, *labels: Any) -> list[dict[str, Any]]:
    """Rows as JSON has them: numbers are numbers."""
    return [{"text": "red card", "label": label} for label in labels]


def table(folder: Path, *labels: Any) -> Path:
    """The same as a CSV."""
    path = folder / f"{'-'.join(map(str, labels))}.csv"
    path.write_text("text,label\n" + "".join(f"red card,{label}\n" for label in labels))
    return path


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ((table, "12a", "13"), (table, "14", "15")),
        ((table, "1", "2"), (table, "lost", "parcel")),
        ((table, "1", "2"), (typed, 3, 4)),
        ((typed, "x", "y"), (table, "1", "2")),
        ((typed, 1, 2), (table, "2", "3")),
    ],
)
def test_labels_of_a_csv_have_no_kind(
    first: tuple[Any, ...], later: tuple[Any, ...], bert: Path, tmp_path: Path
) -> None:
    toy_learner(tmp_path / "learner", bert, "ncm").learn(first[0](tmp_path, *first[1:]), name="first")
    learner = Learner.open(tmp_path / "learner")
    learner.learn(later[0](tmp_path, *later[1:]), name="later")
    assert learner.classes == list(dict.fromkeys(map(str, (*first[1:], *later[1:]))))


def test_kinds_are_kept_account_of_past_a_csv(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", bert, "ncm")
    learner.learn(typed(tmp_path, 1, 2), name="typed")
    learner.learn(table(tmp_path, "2", "3"), name="table")
    for one in (learner, Learner.open(tmp_path / "learner")):
        with pytest.raises(DataError, match=r"kind 'name' \(such as 'x'\), those learned before of kind 'integer'"):
            one.learn(typed(tmp_path, "x", "y"))


@pytest.mark.parametrize("kind", ["integer", "name"])
def test_learners_of_earlier_versions_go_on_with_their_csv(kind: str, tmp_path: Path) -> None:
    class TextModel:
        modality, image_size = "text", None

    rules = ClassScenario("class_incremental", backbone=TextModel(), columns={})  # type: ignore[arg-type]
    rules.restore([{"labels": ["1", "2"], "label_kind": kind}])
    assert rules.load(table(tmp_path, "3", "4"), None).classes == ("3", "4")
    assert rules.load(table(tmp_path, "12a", "13"), None).classes == ("12a", "13")


def test_rows_that_are_kept_and_the_same_rows_given_are_judged_alike(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", bert, "probe", scenario="task_incremental", keep_validation=4)
    given = []
    for number, labels in enumerate((("a", "b"), ("c", "d"))):
        rows = [{"text": f"word {i} {label}", "label": label} for label in labels for i in range(8)]
        given += rows
        learner.learn(rows, name=f"task {number}")
    found = learner.evaluate(given)
    assert all(counts.correct == counts.task_aware for counts in found.counts.values())
    labelled = [learner.predict([row["text"] for row in given[16 * n : 16 * n + 16]], task=n) for n in range(2)]
    correct = sum(one.label == row["label"] for one, row in zip([*labelled[0], *labelled[1]], given, strict=True))
    assert found.accuracy == correct / len(given)
