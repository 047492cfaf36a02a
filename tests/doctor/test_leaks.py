"""Rows in two places, rows by themselves, labels and packages: what is found, and that clean data has no finding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import pytest

from everlora.doctor.coming import ComingTask, Part
from everlora.doctor.data_checks import check_balance, check_spelling, check_texts
from everlora.doctor.environment import check_environment
from everlora.doctor.leaks import check_leaks, check_repeats
from everlora.streams import Examples
from tests.experiments.conftest import coloured


def texts(pairs: Sequence[tuple[str, str]]) -> Examples:
    return Examples(
        "text",
        tuple(text for text, _ in pairs),
        np.array([label for _, label in pairs], dtype=object),
        np.arange(len(pairs)),
    )


def many(count: int, prefix: str = "row") -> list[tuple[str, str]]:
    return [(f"{prefix} {number}", "ab"[number % 2]) for number in range(count)]


def lines(findings: object) -> list[str]:
    return [str(one) for one in findings]  # type: ignore[attr-defined]


def test_a_test_row_in_training_is_broken_when_it_is_many_and_a_warning_when_few() -> None:
    train, leaked = many(50), [("row 7", "b")]
    [found] = check_leaks([ComingTask("t", texts(train), None, texts(many(9, "new") + leaked))])
    assert (found.severity, found.file) == ("broken", "t (test)")
    assert found.what.startswith(
        "has 1 of its 10 rows (10.0%) among the training rows of t too, such as row 10 'row 7'"
    )
    assert "row 8 of t" in found.what
    [found] = check_leaks([ComingTask("t", texts(train), None, texts(many(199, "new") + leaked))])
    assert found.severity == "warning"


def test_rows_that_differ_in_case_or_space_only_are_near_and_a_warning() -> None:
    test = texts([*many(3, "new"), ("  ROW\t7 ", "b"), ("Row 8", "a")])
    [found] = check_leaks([ComingTask("t", texts(many(50)), None, test)])
    assert found.severity == "warning" and "has 2 of its 5 rows (40.0%)" in found.what
    assert "but for case or white space, such as row 4 'ROW 7' and row 8 of t" in found.what


def test_a_row_that_is_the_same_in_one_task_and_near_in_another_is_the_same() -> None:
    test = texts([("Where is my parcel", "a")])
    exact = ComingTask("a", texts([("Where is my parcel", "a")]), None, test)
    near = ComingTask("b", texts([("where is my PARCEL", "a")]))
    for tasks in ([exact, near], [near, exact]):
        leaks = [one for one in check_leaks(tasks) if one.file == "a (test)"]
        assert [one.severity for one in leaks] == ["broken"]
        assert "has 1 of its 1 rows (100.0%) among the training rows of a too, such as" in leaks[0].what


def test_a_leak_between_tasks_is_found_and_other_labels_are_counted() -> None:
    later = ComingTask("late", texts([*many(5, "new"), ("row 1", "z"), ("row 2", "a")]), texts(many(2)), texts(many(1)))
    found = lines(check_leaks([ComingTask("early", texts(many(4))), later]))
    assert len(found) == 4
    assert found[0].startswith(
        "broken: late (validation) has 2 of its 2 rows (100.0%) among the training rows of early"
    )
    assert found[2].startswith("warning: late (test) shares 1 of its 1 rows with late (validation)")
    assert "late shares 2 of its 7 rows with early" in found[3] and "1 have other labels there" in found[3]
    assert "row 6 'row 1' and row 2 of early" in found[3]


def test_images_are_compared_by_their_pixels_and_clean_data_has_no_finding() -> None:
    train, test = coloured(5, seed=1), coloured(2, seed=2)
    assert lines(check_leaks([ComingTask("t", train, None, test)])) == []
    both = dataclasses.replace(
        test, inputs=np.concatenate([np.asarray(test.inputs)[:-1], np.asarray(train.inputs)[3:4]])
    )
    [found] = check_leaks([ComingTask("t", train, None, both)])
    assert found.severity == "broken" and "row 12 and row 4 of t" in found.what


def test_repetitions_and_two_labels_within_a_part() -> None:
    assert lines(check_repeats(Part("t", "training", texts(many(9))))) == []
    found = lines(check_repeats(Part("t", "training", texts([*many(4), ("row 1", "b"), ("ROW 2", "b")]))))
    assert len(found) == 2 and found[0].startswith(
        "warning: t has 1 row that stands there with two labels, such as row 3"
    )
    assert found[1].startswith("note: t repeats 2 of its 6 rows, such as row 2 'row 1' as row 5")


def test_empty_texts_are_counted() -> None:
    assert lines(check_texts(Part("t", "training", texts(many(3))))) == []
    [found] = check_texts(Part("t", "test", texts([*many(3), (" \t", "a"), ("", "b")])))
    assert str(found) == "warning: t (test) has 2 of 5 rows without text (row 4, 5); fill them or drop them"
    rows = Examples("language", ('{"instruction": "say", "output": " "}', '{"text": "x"}'), None, np.arange(2))
    [found] = check_texts(Part("t", "training", rows))
    assert "has 1 of 2 rows without text (row 1)" in found.what


def test_rare_classes_are_named() -> None:
    def task(*counts: int) -> ComingTask:
        return ComingTask(
            "t", texts([(f"{n} {i}", f"class {n}") for n, count in enumerate(counts) for i in range(count)])
        )

    assert lines(check_balance(task(20, 10))) == []
    [found] = check_balance(task(20, 6, 30))
    assert found.severity == "note" and "1 to 5.0" in found.what
    [found] = check_balance(task(2, 25))
    assert found.severity == "warning" and "1 to 12.5" in found.what and "'class 0' 2" in found.what
    [found] = check_balance(task(3, 4))
    assert (
        found.severity == "warning"
        and "has 2 of 2 classes with fewer than 5 rows: 'class 0' 3, 'class 1' 4" in found.what
    )


def test_labels_that_differ_in_spelling_only() -> None:
    task = ComingTask("t", texts([("x", "Bill Due"), ("y", "refund")]))
    assert lines(check_spelling([task], ["refund", "other"])) == []
    [found] = check_spelling([task], ["bill_due"])
    assert "'Bill Due', which differs in spelling only from 'bill_due' of the labels learned before" in found.what
    [found] = check_spelling([task, ComingTask("u", texts([("z", "Refund ")]))], [])
    assert found.file == "u" and "from 'refund' of t" in found.what


@pytest.mark.parametrize(
    ("vision", "required", "torch", "words"),
    [
        ("0.20.1", "torch==2.5.1", "2.13.0", "was made for torch 2.5.1, and torch 2.13.0 is installed"),
        ("0.28.0+cu128", "torch==2.13.0", "2.13.0+cpu", "is of another build"),
        ("0.28.0+cpu", "torch==2.13.0", "2.13.0+cpu", None),
        ("0.28.0", "torch (==2.13.0)", "2.13.0+cpu", None),
    ],
)
def test_a_torchvision_of_another_torch(
    monkeypatch: pytest.MonkeyPatch, vision: str, required: str, torch: str, words: str | None
) -> None:
    monkeypatch.setattr(metadata, "version", {"torchvision": vision, "torch": torch}.__getitem__)
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy", required])
    found = lines(check_environment())
    assert len(found) == (words is not None) and (words is None or words in found[0])


def test_no_torchvision_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert lines(check_environment()) == []
