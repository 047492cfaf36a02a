"""The benchmarks run at toy size and print the JSON that they promise; how fast they are is not looked at."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def printed(script: str, *arguments: str) -> object:
    command = [sys.executable, str(FOLDER / script), *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("inference", [(), ("--inference",)])
def test_step_cost_prints_a_ratio_for_every_method_and_task(inference):
    size = ("--blocks", "1", "--width", "64", "--batch", "2", "--tokens", "17", "--rank", "2", "--rounds", "2")
    ratios = printed("step_cost.py", *size, *inference)
    assert {"inflora", "inflora_opt", "sd_lora"} <= set(ratios)
    assert ("sd_lora_loop" in ratios) == (not inference)
    assert all(set(row) == {"1", "20", "50"} and min(row.values()) > 0 for row in ratios.values())


@pytest.mark.slow
def test_task_scaling_prints_the_ratio_of_each_task_to_sequential():
    ratios = printed("task_scaling.py", "--tasks", "3", "--rows", "4", "--epochs", "1")
    assert set(ratios) == {"sequential", "inflora_opt", "sd_lora"}
    assert ratios["sequential"] == [1.0, 1.0, 1.0]
    assert all(len(row) == 3 and min(row) > 0 for row in ratios.values())


@pytest.mark.slow
def test_memory_update_prints_rows():
    assert printed("memory_update.py", "--layers", "1", "--width", "64", "--tasks", "2", "--rank", "3")


@pytest.mark.slow
def test_i_lora_step_prints_a_ratio(shared):
    model = str(shared / "models" / "stories260K")
    found = printed("i_lora_step.py", model, "--rows", "2", "--tokens", "8", "--pairs", "3")
    assert set(found) == {"ratio", "replay_seconds", "i_lora_seconds"} and min(found.values()) > 0


@pytest.fixture
def none_of_these_page(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("none_of_these_page")


def test_the_page_on_none_of_these_is_what_its_benchmark_makes_of_its_results(none_of_these_page):
    results, text = none_of_these_page.read(), none_of_these_page.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- figures: ") == 4 and none_of_these_page.filled(text, results) == text
    if "choice" in results:
        assert none_of_these_page.chosen(results) == "height", "what everlora.rejection computes"


def test_the_tables_on_none_of_these_are_means_over_seeds(none_of_these_page):
    sure = {"1": {"height": {"auroc": 0.8, "caught": 0.7}, "margin": {"auroc": 0.9, "caught": 0.5}}}
    seeds = {
        seed: {
            "after_each_task": [share, 0.05],
            "refused": {"0.05": share},
            "caught": {kind: {"0.05": 0.5} for kind in ("intents", "domains", "news")},
            "auroc": dict.fromkeys(("intents", "domains", "news"), 0.75),
            "accuracy": 0.9,
            "accuracy_answered": 0.95,
            "right_and_answered": 0.88,
        }
        for seed, share in (("1", 0.04), ("2", 0.08))
    }
    results = {"choice": {"probe, ncm": sure}, "rows": {"probe, ncm": seeds}}
    assert none_of_these_page.chosen(results) == "height"
    assert "| `height` | 70.0 | 0.800 | 0.800 |\n| `margin` |" in none_of_these_page.choice_table(results)
    assert "| probe, ncm | 6.0 ± 2.8 | 4.0 to 8.0 | 90.0 ± 0.0 |" in none_of_these_page.refused_table(results)
    assert "| 50.0 ± 0.0 | 0.750 |" in none_of_these_page.caught_table(results)
    assert none_of_these_page.filled("<!-- figures: caught -->\n1\n<!-- end -->", {}).count("Not measured yet") == 1
