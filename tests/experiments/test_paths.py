"""Accuracy along the line between the weights of two tasks, in a run."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner, run
from everlora.errors import OptionError
from everlora.experiments.paths import path_positions
from everlora.experiments.plan import Plan, make_plan
from everlora.streams import Examples

Start = Callable[..., dict[str, Any]]
# So that the weights after the tasks, and their answers, differ.
LARGE_STEPS = {"rank": 2, "lr": 0.3, "head_lr": 0.01, "epochs": 3}


@pytest.fixture
def start(recipe_file: Path, network: Path, splits: dict[str, Examples], tmp_path: Path) -> Start:
    """Run SD-LoRA on the small stream of three tasks."""

    def go(**changes: Any) -> dict[str, Any]:
        given = {"data": splits, "model": network, "out": tmp_path / "out", "seeds": [3], "methods": ["sd_lora"]}
        return run(recipe_file, **{**given, "options": LARGE_STEPS, "path_points": 5, **changes})

    return go


def place(entry: dict[str, Any], at: float | str) -> dict[str, Any]:
    return next(one for one in entry["places"] if one["at"] == at)


def check_ends(one: dict[str, Any]) -> None:
    """The ends of each path are what was measured after the two tasks."""
    assert [(entry["first"], entry["second"]) for entry in one["paths"]] == [(0, 1), (1, 2)]
    for entry in one["paths"]:
        first, second = entry["first"], entry["second"]
        assert place(entry, "before")["correct"] == one["correct"][first][:second]
        assert place(entry, 0.0)["task_aware"][:second] == one["task_aware"][first][:second]
        for name in ("correct", "task_aware"):
            assert place(entry, 1.0)[name] == one[name][second][: second + 1]


def test_positions_include_both_ends() -> None:
    assert path_positions(5) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert path_positions(2) == [-0.5, 0.0, 1.0, 1.5]
    assert len(path_positions(21)) == 21
    assert path_positions(4) == [-0.5, 0.0, 0.166667, 0.833333, 1.0, 1.5]
    with pytest.raises(OptionError, match="2 points or more, found 1"):
        path_positions(1)


@pytest.mark.parametrize("preset", ["everlora", "official"])
def test_the_ends_of_a_path_are_the_rows_of_the_matrix(start: Start, tmp_path: Path, preset: str) -> None:
    results = start(options={**LARGE_STEPS, "preset": preset})
    [one] = results["runs"]
    check_ends(one)
    for entry in one["paths"]:
        places = [place["at"] for place in entry["places"]]
        assert places == ["before", -0.5, 0.0, 0.5, 1.0, 1.5, *(["start"] if preset == "official" else [])]
    answers = [{str(place["correct"]) for place in entry["places"][1:6]} for entry in one["paths"]]
    assert max(map(len, answers)) > 1, "the weights on the way differ"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["paths"] == one["paths"]


def test_measuring_paths_changes_nothing_else(start: Start, tmp_path: Path) -> None:
    with_paths, without = start(), start(out=tmp_path / "plain", path_points=0)
    assert "paths" not in without["runs"][0]
    for name in ("correct", "task_aware", "task_correct", "panels"):
        assert with_paths["runs"][0][name] == without["runs"][0][name]
    learners = [Learner.open(tmp_path / name / "sd_lora-3" / "learner") for name in ("out", "plain")]
    assert learners[0].digest == learners[1].digest


def test_a_finished_run_gets_its_paths_without_learning_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start(path_points=0)
    monkeypatch.setattr(Learner, "learn", lambda *args, **options: pytest.fail("learned again"))
    later = start()
    check_ends(later["runs"][0])
    monkeypatch.setattr(Learner, "open", lambda *args, **options: pytest.fail("measured again"))
    assert start()["runs"] == later["runs"]
    assert start(path_points=0)["runs"] == later["runs"], "what was measured stays"


def test_the_number_of_points_reaches_other_processes_and_old_plans_have_none(tiny: str) -> None:
    plan = dataclasses.replace(make_plan(tiny, file="tiny", model="m"), path_points=7)
    values = plan.to_json()
    assert Plan.from_json(values).path_points == 7
    del values["path_points"]
    assert Plan.from_json(values).path_points == 0


def test_a_model_that_is_gone_leaves_its_reason(start: Start) -> None:
    # The first two directions are merged before the third is learned, so that pair has no common factors.
    options = {**LARGE_STEPS, "max_rank": 4, "keep_last": 0, "max_compress_error": 1.0}
    paths = start(options=options)["runs"][0]["paths"]
    assert "places" in paths[0] and "reason" not in paths[0]
    assert "merged" in paths[1]["reason"] and "places" not in paths[1]


def test_methods_that_keep_no_weights_are_named_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="everlora"):
        results = start(methods=["probe", "joint"], options={})
    assert not any("paths" in one for one in results["runs"])
    words = [record.getMessage() for record in caplog.records if "paths" in record.getMessage()]
    assert words == ["no accuracy along paths for probe, joint: the method keeps no earlier weights."]


def test_heads_that_are_rewritten_rule_paths_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="everlora"):
        results = start(options={**LARGE_STEPS, "alignment": True, "alignment_epochs": 1})
    assert "paths" not in results["runs"][0]
    assert sum("alignment rewrites the heads" in record.getMessage() for record in caplog.records) == 1


def test_too_few_points_are_refused_before_anything_is_written(start: Start, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="2 points or more"):
        start(path_points=1)
    assert not (tmp_path / "out").exists()
