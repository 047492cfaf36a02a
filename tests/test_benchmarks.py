"""The benchmarks run at toy size and print the JSON that they promise; how fast they are is not looked at."""

from __future__ import annotations

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
