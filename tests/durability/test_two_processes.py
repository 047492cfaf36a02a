"""Two processes that fail together go on together, from what the first of them saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import everlora
from tests.durability.two_processes import LEARNERS
from tests.toy import tiny_model

REPOSITORY = Path(everlora.__file__).parents[1]


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("vit", tmp_path / "vit")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.durability.two_processes", str(tmp_path), str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, errors = started.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the launcher alone would leave its processes behind
            raise
    assert started.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2))
    for name in LEARNERS:
        assert first[name]["digests"] == second[name]["digests"]
        whole, resumed = first[name]["digests"]
        assert whole == resumed, name
        assert "process 1 of 2 failed" in first[name]["seen"] and second[name]["seen"] == "the lamp went out"
        assert first[name]["saved"] == second[name]["saved"] > 0
        rows = 20 if name == "replay" else 24
        assert first[name]["saved"] + first[name]["trained"] == 2 * -(-rows // 8), "only the first process reports"
        assert second[name]["trained"] == 0
