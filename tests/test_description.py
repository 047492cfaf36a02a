"""What learners and results show of themselves, in a terminal and in a notebook."""

from __future__ import annotations

import re
from html import unescape
from types import SimpleNamespace

import pytest

from everlora.description import Describes
from everlora.results import Counts, Evaluation, LanguageEvaluation, LanguageScore, TaskResult
from everlora.settings import Settings
from everlora.store import LearnerStore
from tests.cli.conftest import FEBRUARY, HEADER, JANUARY

ATTACK = "<script>alert('1')</script>"


class Described(Describes):
    """A learner without a model."""

    def __init__(self, store: LearnerStore) -> None:
        self.path, self._store = store.root, store
        self.settings = Settings.of("inflora", {"rank": 3, "epochs": 2})


def cells(page: str) -> list[list[str]]:
    """Texts of a table by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def caption(page: str) -> str:
    return unescape(re.findall(r"<caption>(.*?)</caption>", page)[0])


@pytest.fixture
def learner(tmp_path):
    def make(header, records):
        with LearnerStore.create(tmp_path / "mine", {**HEADER, **header}) as store:
            for name, record in records:
                store.write_task(name, record=record, arrays={}, documents={}, state_arrays={}, state_values={})
        return Described(LearnerStore.open(tmp_path / "mine"))

    return make


def test_a_learner_shows_its_tasks(learner) -> None:
    mine = learner({}, [("january", JANUARY), (f"feb {ATTACK}", {**FEBRUARY, "labels": [f"l{n}" for n in range(9)]})])
    assert repr(mine).startswith("Learner(") and "method='inflora'" in repr(mine)
    assert "tasks=2, classes=11, accuracy=0.7250)" in repr(mine)
    page = mine._repr_html_()
    assert caption(page) == "Learner mine: inflora, class_incremental, model [base]"
    assert cells(page) == [
        ["Task", "Rows", "Seconds", "Labels", "Accuracy % when learned", "Now"],
        ["january", "40", "3.5", "refund, parcel", "90.00", "70.00"],
        [f"feb {ATTACK}", "30", "4.0", "l0, l1, l2, l3, l4, l5 and 3 more", "75.00", "75.00"],
    ]
    assert "<script" not in page


def test_a_new_learner_and_one_that_keeps_no_rows(learner) -> None:
    mine = learner({}, [("january", {**JANUARY, "evaluation": {}})])
    assert "accuracy" not in repr(mine) and cells(mine._repr_html_())[1][-2:] == ["-", "-"]
    assert cells(Described(SimpleNamespace(root=mine.path, **_empty()))._repr_html_()) == [
        ["Task", "Rows", "Seconds", "Labels", "Accuracy % when learned", "Now"]
    ]


def _empty():
    return {"header": HEADER, "tasks": (), "keep_states": "newest", "digest": "0"}


def test_a_learner_of_language_shows_nats(learner) -> None:
    score = {"nll": 250.0, "tokens": 100}
    mine = learner({"scenario": "language"}, [("plays", {"num_examples": 5, "evaluation": {"0": score}, "cost": {}})])
    assert cells(mine._repr_html_())[1] == ["plays", "5", "-", "2.5000", "2.5000"]


def test_the_card_holds_the_lineage(learner) -> None:
    card = learner({"versions": {"torch": "2"}}, [("january", JANUARY)]).card()
    assert (card["base_sha256"], card["versions"], card["options"]) == ("0" * 64, {"torch": "2"}, {})
    assert card["changed_options"] == {"method.rank": 3, "training.epochs": 2}
    task = card["tasks"][0]
    assert (task["name"], task["num_examples"], task["accuracy_now"]) == ("january", 40, 0.9)


def test_results_are_tables_in_notebooks() -> None:
    counts = {ATTACK: Counts(9, 10), "b": Counts(1, 4)}
    page = Evaluation(10 / 14, {name: one.accuracy for name, one in counts.items()}, counts)._repr_html_()
    assert caption(page) == "Accuracy 71.43 % on 14 rows" and "<script" not in page
    assert cells(page)[1:] == [[ATTACK, "10", "90.00"], ["b", "4", "25.00"]]
    score = LanguageScore(200.0, 100, 150, 5, 3, 4)
    page = LanguageEvaluation(score + score, {"plays": score})._repr_html_()
    assert cells(page)[1:] == [
        ["plays", "5", "100", "2.0000", "7.39", "75.00"],
        ["all", "10", "200", "2.0000", "7.39", "75.00"],
    ]


def test_the_mean_rouge_is_over_written_rows() -> None:
    chosen = LanguageScore(0.0, 0, 0, 0, correct=90, answers=90)
    few = chosen + LanguageScore(0.0, 0, 0, 0, correct=0, answers=10, rouge_l=0.2, written=10)
    more = LanguageScore(0.0, 0, 0, 0, correct=0, answers=10, rouge_l=0.8, written=10)
    assert (few + more).rouge_l == pytest.approx(0.5) == (more + few).rouge_l and (few + more).written == 20


def test_a_task_is_a_table_in_notebooks() -> None:
    values = {"index": 1, "name": "february", "num_examples": 30, "num_validation": 0, "seconds": 65.24, "steps": 12}
    one = TaskResult(labels=("a", "b"), new_labels=("a",), known_labels=(), **values)
    assert caption(one._repr_html_()) == "Task 2 'february': 30 rows, 12 steps, 65.2 s"
    assert cells(one._repr_html_()) == [["New labels", "Known labels"], ["a", "-"]]
    two = TaskResult(labels=("a",), new_labels=(), known_labels=(), metrics={"january": 0.5}, **values)
    assert cells(two._repr_html_()) == [["On rows kept of", "Accuracy %"], ["january", "50.00"]]
    language = TaskResult(labels=(), new_labels=(), known_labels=(), metrics={"plays": 2.5}, **values)
    assert cells(language._repr_html_())[1] == ["plays", "2.5000"]
