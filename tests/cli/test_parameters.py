from __future__ import annotations

import pytest
import typer

from everlora.cli.parameters import columns_from, parse_settings, split_names


def test_values_are_json_where_they_can_be_and_words_elsewhere() -> None:
    words = ["rank=4", "lr=1e-3", "projection=false", "total-tasks=null", "loss=seen", 'targets=["key", "value"]']
    assert parse_settings(words) == {
        "rank": 4,
        "lr": 1e-3,
        "projection": False,
        "total_tasks": None,
        "loss": "seen",
        "targets": ["key", "value"],
    }


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1993,1994", "", "{", "a=b"])
def test_what_is_no_plain_json_stays_a_word(word: str) -> None:
    assert parse_settings([f"key={word}"]) == {"key": word}


def test_a_quoted_value_is_a_string() -> None:
    assert parse_settings(['name="4"']) == {"name": "4"}


def test_switches_join_the_options_when_given() -> None:
    assert parse_settings(["rank=4"], seed=0, pooling=None) == {"rank": 4, "seed": 0}
    assert parse_settings(None) == {}


@pytest.mark.parametrize("word", ["rank", "=4", " =4"])
def test_a_word_without_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected KEY=VALUE"):
        parse_settings([word])


def test_an_option_given_twice_is_refused_whatever_its_spelling() -> None:
    with pytest.raises(typer.BadParameter, match="'keep_validation' is given twice"):
        parse_settings(["keep-validation=3"], keep_validation=5)
    with pytest.raises(typer.BadParameter, match="'rank' is given twice"):
        parse_settings(["rank=3", "rank=3"])


def test_columns_and_names() -> None:
    assert columns_from(text=None, label=None) is None
    assert columns_from(text="utterance", label=None) == {"text": "utterance"}
    assert split_names(" a, b,,c ") == ["a", "b", "c"]
    assert split_names(None) is None
