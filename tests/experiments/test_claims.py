"""Each verdict, from numbers made up for it."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest

from everlora.experiments.claims import Verdict, compared, joined, judge, only_zero, unchanged
from everlora.experiments.schema import ClaimSpec, Figure
from everlora.report.claims import _UNITS, claims_caption, format_claims
from everlora.report.figures import run_figures
from everlora.report.language import language_values
from everlora.report.table import grouped_matrices
from tests.report.conftest import sample_results
from tests.report.language_results import language_results


def seeds(*values: float) -> dict[int | None, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("first", "second", "wanted", "margin", "verdict"),
    [
        ((0.8, 0.9, 0.85), (0.7, 0.8, 0.75), "greater", 0.0, "reproduced"),
        ((0.7, 0.8, 0.75), (0.8, 0.9, 0.85), "greater", 0.0, "opposite"),
        ((0.8, 0.7, 0.75), (0.7, 0.8, 0.76), "greater", 0.0, "not reproduced"),
        ((0.8, 0.8, 0.8), (0.8, 0.8, 0.8), "greater", 0.0, "not reproduced"),
        ((0.79, 0.89, 0.84), (0.8, 0.9, 0.85), "greater", 0.02, "reproduced"),
        ((0.77, 0.87, 0.82), (0.8, 0.9, 0.85), "greater", 0.02, "opposite"),
        ((2.0, 3.0, 2.5), (4.0, 5.0, 4.0), "less", 0.0, "reproduced"),
        ((4.0, 5.0, 4.0), (2.0, 3.0, 2.5), "less", 0.0, "opposite"),
        ((4.0, 2.0, 3.0), (3.0, 3.0, 3.1), "less", 0.0, "not reproduced"),
        ((1.0, 1.0), (9.0, 9.0), "less", 0.0, "inconclusive"),
        ((1.0,), (9.0,), "less", 0.0, "inconclusive"),
    ],
)
def test_a_comparison_needs_its_whole_interval_on_one_side(first, second, wanted, margin, verdict) -> None:
    found = compared(seeds(*first), seeds(*second), wanted=wanted, margin=margin)
    assert found["verdict"] == verdict
    assert found["n"] == len(first)
    assert found["difference"] == pytest.approx(sum(first) / len(first) - sum(second) / len(second))
    if len(first) > 1:
        assert found["low"] <= found["difference"] + 1e-12 and found["difference"] <= found["high"] + 1e-12


def test_only_seeds_that_both_rows_have_are_compared() -> None:
    found = compared({1: 0.9, 2: 0.9, 3: 0.9, 4: 0.0}, {1: 0.5, 2: 0.5, 3: 0.5, 5: 1.0}, wanted="greater")
    assert (found["n"], found["verdict"]) == (3, "reproduced")
    assert compared({1: 0.9}, {2: 0.9}, wanted="greater")["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((0.0, 0.0, 0.0), (0.2, 0.1, 0.3), "reproduced"),
        ((0.0, 0.001, 0.0), (0.2, 0.1, 0.3), "not reproduced"),
        ((0.4, 0.3, 0.5), (0.2, 0.1, 0.3), "opposite"),
        ((0.0, 0.0, 0.0), (0.04, 0.05, 0.06), "inconclusive"),
        ((0.0, 0.0), (0.2, 0.1), "inconclusive"),
    ],
)
def test_nothing_but_zero_counts_as_zero(first, second, verdict) -> None:
    assert only_zero(seeds(*first), seeds(*second), margin=0.05)["verdict"] == verdict


def traced(*, base: bool = True, tasks: bool = True) -> dict[str, Any]:
    """A run of two tasks whose tensors stay, or do not."""
    last = {"pretrained": "p" if base else "q", "tasks": ["a" if tasks else "z", "b"]}
    return {"pretrained_digest": "p", "digests": [{"pretrained": "p", "tasks": ["a"]}, last]}


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([traced()] * 3, "reproduced"),
        ([traced(), traced(), traced(base=False)], "not reproduced"),
        ([traced(tasks=False)] * 3, "not reproduced"),
        ([traced(base=False, tasks=False)] * 3, "opposite"),
        ([traced()] * 2, "inconclusive"),
        ([traced(), traced(), {}], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_tensors_stay_or_do_not(runs, verdict) -> None:
    assert unchanged(runs)["verdict"] == verdict


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["opposite", "opposite"], "opposite"),
        (["reproduced", "opposite"], "not reproduced"),
        (["reproduced", "inconclusive"], "inconclusive"),
        (["not reproduced"], "not reproduced"),
    ],
)
def test_a_claim_on_several_numbers(parts: list[Verdict], whole: Verdict) -> None:
    assert joined(parts) == whole


CLAIMS = {
    "A": ClaimSpec(claim="keeps more", test="greater", row="steady", against="falling", figures=("til",)),
    "B": ClaimSpec(
        claim="falls", test="less", row="falling", against="steady", figures=("cil",), shown=("task_recognition",)
    ),
    "C": ClaimSpec(claim="never ran", test="greater", row="steady", against="absent", figures=("til",)),
    "D": ClaimSpec(claim="not recorded", test="less", row="steady", against="falling", figures=("e95_ref",)),
    "E": ClaimSpec(claim="stays", test="unchanged", row="steady"),
}


def test_claims_are_judged_from_the_runs() -> None:
    results = sample_results()
    for run in results["runs"]:
        run |= traced()
    found = {entry["id"]: entry for entry in judge(CLAIMS, results)}
    assert {name: entry["verdict"] for name, entry in found.items()} == {
        "A": "reproduced",
        "B": "reproduced",
        "C": "inconclusive",
        "D": "inconclusive",
        "E": "reproduced",
    }
    assert found["C"]["reason"] == "not run: absent"
    assert [(one["figure"], one["decides"]) for one in found["B"]["findings"]] == [
        ("cil", True),
        ("task_recognition", False),
    ]
    # The run's own numbers, not other ones.
    values = {
        (run["method"], run["seed"]): run_figures(run, matrix, None)["til"]
        for group in grouped_matrices(results).values()
        for run, matrix in group
    }
    expected = sum(values["steady", s] - values["falling", s] for s in (1, 2, 3)) / 3
    assert found["A"]["findings"][0]["difference"] == pytest.approx(expected)
    assert judge(CLAIMS, results) == judge(CLAIMS, copy.deepcopy(results)), "the interval is drawn with a seed"
    assert judge({}, results) == []


def test_two_seeds_decide_nothing() -> None:
    results = sample_results(seeds=(1, 2))
    assert {entry["verdict"] for entry in judge(CLAIMS, results)} == {"inconclusive"}


def test_claims_become_rows_of_text() -> None:
    results = sample_results()
    results |= {"claims": judge(CLAIMS, results), "model": "tiny", "settings": {"setting": "short"}}
    table = format_claims(results)
    assert [row[0] for row in table.rows] == list(CLAIMS)
    row = table.rows[0]
    assert row[2] == "reproduced"
    assert row[3].startswith("TIL accuracy: Steady ") and "difference +" in row[3] and "[+" in row[3]
    assert "not decisive" in table.rows[1][3]
    assert claims_caption(results).startswith("Measured with network tiny, setting short, 3 tasks, 3 seeds;")


def test_every_figure_a_recipe_may_name_is_measured_and_has_words() -> None:
    results = sample_results()
    run, matrix = next(iter(grouped_matrices(results).values()))[0]
    assert set(get_args(Figure)) == set(_UNITS)
    of_language = next(iter(language_values(language_results())["double"].values()))
    assert set(get_args(Figure)) <= {*run_figures(run, matrix, None), *of_language}
