"""Comparing texts: exact match, numbers, ROUGE-L."""

from __future__ import annotations

from decimal import Decimal

import pytest

from everlora.language.answers import exact_match, final_number, is_right, rouge_l, same_number, words_of


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Paris", "paris", True),
        ("  New\n York\t", "new york", True),
        ("Straße", "STRASSE", True),
        ("Paris.", "Paris", False),
        ("", "", False),
        (" \n", "", False),
        ("", "Paris", False),
        ("Because", "B", False),
        ("yes", "no", False),
    ],
)
def test_exact_match(prediction: str, answer: str, same: bool) -> None:
    assert exact_match(prediction, answer) is same


def test_exact_match_without_punctuation() -> None:
    assert exact_match("Paris!", "“Paris”", punctuation=True)
    assert exact_match("well-known", "well known", punctuation=True)
    assert not exact_match("...", "", punctuation=True)
    assert not exact_match("1+1", "11", punctuation=True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = 24 clips.\n#### 72", "72"),
        ("#### 1,080", "1080"),
        ("#### $1,234,567.50 dollars, not 3", "1234567.50"),
        ("#### -5", "-5"),
        ("so #### none, but 7 before 9", "7"),
        ("5 and then 9 ####", "9"),
        ("First 3, then the answer is 1,024.", "1024"),
        ("10-5", "5"),
        ("x=-5", "-5"),
        ("about .5 of it", ".5"),
        ("1,2,3", "3"),
        ("1,234,5", "5"),
        ("12kg", "12"),
        ("version v2", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value() -> None:
    assert same_number("It is 18.0", "9 + 9\n#### 18")
    assert not same_number("It is 19", "#### 18")
    assert not same_number("no idea", "none")
    assert is_right("the answer is 1,000", "work\n#### 1000")
    assert not is_right("the answer is 1000", "1000")  # no mark: the text itself is the answer


def test_words() -> None:
    assert words_of("The  cat\nsat") == ["the", "cat", "sat"]
    assert words_of("今日はいい天気 ok") == [*"今日はいい天気", "ok"]
    assert words_of("中文ABC") == ["中", "文", "abc"]
    assert words_of("한국어 문장") == ["한국어", "문장"]


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The Cat", "the cat", 1.0),
        ("the cat sat on the mat", "the cat lay on a mat", 2 * (4 / 6) * (4 / 6) / (8 / 6)),
        ("cat the", "the cat", 0.5),
        ("a b", "a b c d", 2 * 1.0 * 0.5 / 1.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("", "", 0.0),
        ("我喜欢猫", "我喜欢狗", 0.75),
        ("привет мир", "привет", 2 / 3),
    ],
)
def test_rouge_l(prediction: str, answer: str, value: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(value)
