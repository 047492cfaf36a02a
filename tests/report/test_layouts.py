"""Figures of a run against numbers that can be worked out by hand, and the tables made of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from everlora.report import format_table, render_report, summarise, tables
from everlora.report.table import run_values


@pytest.fixture
def head_to_head(results: dict[str, Any]) -> dict[str, Any]:
    """The sample with what a head-to-head table needs; `steady` is the reference."""
    curves = {
        "falling": [[[0.1, 0.0], [0.5, 2.0], [0.8, 4.0]]] * 3,
        "steady": [[[0.1, 0.0], [0.79, 3.0], [0.8, 6.0]], [[0.2, 0.0], [0.5, 3.0], [1.0, 6.0]], [[0.5, 0.0]] * 3],
    }
    for run in results["runs"]:
        run["reference_parameters"] = 8000
        for task, entry in enumerate(run["cost"]):
            entry |= {"step_seconds": 0.5 + task, "state_bytes": 2_000_000 * (task + 1), "curve": []}
            if run["method"] in curves:
                entry["curve"] = curves[run["method"]][task]
            entry["stored_parameters"] = 9000 + 1000 * task if run["method"] == "steady" else 8500
        if run["method"] == "together":
            run["cost"] = run["cost"][-1:]
    rows = {"falling": {"family": "rehearsal", "trials": 3}, "steady": {"family": "reference", "trials": 3}}
    return results | {"table": "head_to_head", "reference": "steady", "rows": rows}


def test_growth_counts_from_the_network_with_its_first_head(head_to_head: dict[str, Any]) -> None:
    steady = run_values(head_to_head)["steady"][1]
    assert steady["params_growth"] == pytest.approx(11000 / 8000 - 1)
    assert steady["growth_per_task"] == pytest.approx(2000 / (2 * 8000))
    assert steady["relative_size"] == pytest.approx(1.375)
    together = run_values(head_to_head)["together"][1]
    assert together["params_growth"] == pytest.approx(0.0625)
    assert together["growth_per_task"] is None, "it had no first task"


def test_speed_is_measured_by_the_reference_on_the_same_task(head_to_head: dict[str, Any]) -> None:
    falling = run_values(head_to_head)["falling"][2]
    # 95 % of 0.8 is reached after 2 epochs, 95 % of 1.0 never, 95 % of 0.5 after one.
    assert falling["e95_ref"] == pytest.approx((2 + 3 + 1) / 3)
    assert falling["s95_ref"] == pytest.approx((4.0 + 6.0 + 2.0) / 3)
    assert falling["e95_reached"] == pytest.approx(2 / 3)
    assert falling["e95_own"] == 2.0
    assert falling["aulc"] == pytest.approx(0.65)
    steady = run_values(head_to_head)["steady"][2]
    assert (steady["e95_ref"], steady["e95_reached"]) == (steady["e95_own"], 1.0)


def test_the_reference_is_that_of_the_same_seed(head_to_head: dict[str, Any]) -> None:
    changed = copy.deepcopy(head_to_head)
    for run in changed["runs"]:
        if run["method"] == "steady" and run["seed"] == 2:
            run["cost"][0]["curve"] = [[0.1, 0.0], [0.2, 1.0], [0.3, 2.0]]
    before, after = (run_values(one)["falling"] for one in (head_to_head, changed))
    assert before[1] == after[1]
    assert after[2]["e95_ref"] < before[2]["e95_ref"]
    without = run_values(head_to_head | {"reference": None})["falling"][2]
    assert without["e95_ref"] is None and without["e95_own"] == 2.0


def test_a_run_that_learned_all_at_once_has_no_speed(head_to_head: dict[str, Any]) -> None:
    together = run_values(head_to_head)["together"][1]
    assert all(together[name] is None for name in ("e95_own", "e95_ref", "s95_ref", "aulc", "learning_acc"))
    assert together["til"] is not None and together["sec_step"] == 2.5


def test_accuracies_with_and_without_the_task(head_to_head: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in summarise(head_to_head)}
    for row in rows.values():
        assert row["figures"]["cil"] == row["metrics"]["last"]
        assert row["figures"]["til"] == row["metrics"]["task_aware_last"]
        assert row["figures"]["forgetting_cil"] == row["metrics"]["forgetting"]
    # Each task loses 3 hits, or 1, with every further task, whether it is given or not.
    assert (
        rows["falling"]["figures"]["forgetting_til"]["mean"] > rows["steady"]["figures"]["forgetting_til"]["mean"] > 0
    )


def test_tables_say_zero_only_where_nothing_was_rounded(head_to_head: dict[str, Any]) -> None:
    for run in head_to_head["runs"]:
        if run["method"] == "steady":
            diagonal = [run["task_aware"][task][task] for task in range(3)]
            run["task_aware"] = [[diagonal[j] if j <= i else None for j in range(3)] for i in range(3)]
            run["correct"] = [
                [min(c, diagonal[j]) if c is not None else None for j, c in enumerate(row)] for row in run["correct"]
            ]
            run["task_correct"] = None
    accuracy, size, speed = tables(head_to_head)
    cells = {row[0]: dict(zip(accuracy.table.columns, row, strict=True)) for row in accuracy.table.rows}
    assert cells["Steady"]["Forgetting TIL"] == cells["Steady"]["BWT TIL"] == "0"
    assert cells["Falling"]["Forgetting TIL"].startswith("9.") or "±" in cells["Falling"]["Forgetting TIL"]
    assert cells["Falling"]["Family"] == "rehearsal"
    sizes = {row[0]: dict(zip(size.table.columns, row, strict=True)) for row in size.table.rows}
    assert sizes["Steady"]["Growth %"].startswith("37.5")
    assert sizes["Steady"]["On disk, MB"].startswith("6.00")
    speeds = {row[0]: dict(zip(speed.table.columns, row, strict=True)) for row in speed.table.rows}
    assert speeds["Falling"]["Epochs to 95 % of reference"] == "2.0 ± 0.0 (67 % reached)"
    assert speeds["Falling"]["Trials"] == "3"


def test_the_layout_is_the_recipes(results: dict[str, Any], head_to_head: dict[str, Any]) -> None:
    plain = {name: value for name, value in results.items() if name != "table"}
    [only] = tables(plain)
    assert only.table == format_table(summarise(plain))
    assert len(tables(head_to_head)) == 3


def test_the_page_shows_tables_claims_and_the_picture(head_to_head: dict[str, Any]) -> None:
    finding = {"figure": "til", "decides": True, "n": 3, "ratio": 0.9, "difference": -0.1, "low": -0.2, "high": -0.05}
    finding |= {"row": {"mean": 0.7, "sd": 0.1}, "against": {"mean": 0.8, "sd": 0.1}, "verdict": "opposite"}
    claim = {"id": "C9", "claim": "<b>better", "published": "never", "row": "falling", "against": "steady"}
    claim |= {"verdict": "opposite", "reason": "", "findings": [finding]}
    text = render_report(head_to_head | {"claims": [claim]})
    assert "<b>better" not in text and "&lt;b&gt;better" in text
    assert "TIL accuracy: Falling 70.0 and Steady 80.0 %, difference -10.0 [-20.0, -5.0]" in text
    assert text.count("growth of the parameters") == 2
    assert "Falling:" in text and "at a growth of +6.2 %" in text
    plain = render_report({name: value for name, value in head_to_head.items() if name != "table"})
    assert "What is stored" not in plain
