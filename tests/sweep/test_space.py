"""Values and ranges: what is read, what is refused, and what is drawn."""

from __future__ import annotations

import pytest

from everlora.errors import OptionError
from everlora.sweep.space import Range, drawn_settings, grid_settings, read_space


def test_a_grid_is_every_combination_in_order() -> None:
    space = read_space({"lr": "1e-3,3e-3", "head-init": ["zeros"], "targets": "[query, value],key"})
    assert space["targets"] == ("[query, value]", "key") and space["lr"] == (0.001, 0.003)
    settings = grid_settings(read_space({"lr": "1e-3,3e-3", "rank": [4, 8], "flag": "true,null"}))
    assert [tuple(one.values()) for one in settings[:3]] == [(0.001, 4, True), (0.001, 4, None), (0.001, 8, True)]
    assert len(settings) == 8


def test_draws_stay_in_their_ranges_and_begin_alike() -> None:
    space = read_space({"lr": "log:1e-4..1e-1", "rank": "int:2..5", "drop": "0..0.5", "kind": "a,b"})
    many = drawn_settings(space, 200, seed=1)
    assert many[:5] == drawn_settings(space, 5, seed=1) != drawn_settings(space, 5, seed=2)
    assert {one["rank"] for one in many} == {2, 3, 4, 5} and {one["kind"] for one in many} == {"a", "b"}
    assert all(1e-4 <= one["lr"] <= 0.1 and 0 <= one["drop"] <= 0.5 for one in many)
    below = sum(one["lr"] < 10**-2.5 for one in many)
    assert 70 <= below <= 130, "half of a logarithmic range lies below its geometric middle"


def test_the_outer_tenth_of_a_range_is_its_edge() -> None:
    assert Range(1e-4, 1.0, is_log=True).edge(2e-4) == "smallest"
    assert Range(1e-4, 1.0, is_log=True).edge(0.3) is None and Range(0, 1).edge(0.95) == "largest"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "something to try"),
        ({"lr": "1e-3,"}, "empty value"),
        ({"lr": "1,1"}, "one value twice"),
        ({"lr": "1..x"}, "no range in"),
        ({"lr": "lin:1..2"}, "begins with 'lin'"),
        ({"lr": "2..1"}, "smaller number to a larger"),
        ({"lr": "log:0..1"}, "above 0"),
        ({"rank": "int:1.5..3"}, "whole number"),
        ({"lr": "0..inf"}, "finite"),
    ],
)
def test_what_is_no_space_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_space(given)


def test_a_grid_has_no_ranges_and_not_too_many_settings() -> None:
    with pytest.raises(OptionError, match="--random N"):
        grid_settings(read_space({"lr": "0..1"}))
    with pytest.raises(OptionError, match="more than"):
        grid_settings(read_space({name: list(range(30)) for name in "abc"}))
