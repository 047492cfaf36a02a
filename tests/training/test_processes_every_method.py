"""Every method learns in two processes what it learns in one, number for number, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import everlora
from tests.training.every_method import CASES, Case, save_models

REPOSITORY = Path(everlora.__file__).parents[1]
TOLERANCE = 1e-9
# methods whose usual options let the statistics of batch norms follow the data
MOVING = {
    *("sequential", "joint", "replay", "lwf", "ewc", "convlora", "senacnn", "independent", "packnet", "pnn"),
}
SENTENCE = (
    "batch norms whose statistics move must see all rows of a step at once, found 2 processes with 1 micro-batches; "
    "use one of each, or options of the method that keep the statistics."
)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes, started once for all methods, found."""
    folder = tmp_path_factory.mktemp("every")
    save_models(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.every_method", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, errors = started.communicate(timeout=3600)
        except BaseException:
            os.killpg(started.pid, signal.SIGKILL)  # the launcher alone would leave its processes behind
            raise
    assert started.returncode == 0, errors
    found = [json.loads((folder / f"verdicts-{rank}.json").read_text()) for rank in range(2)]
    assert [part.pop("size") for part in found] == [2, 2], "two processes, and not one twice"
    return {**found[0], **found[1]}


def _is_refused(case: Case) -> bool:
    keeps = {"affine_only", "frozen_eval"} & {case.options.get("bn"), case.options.get("norm")}
    return case.kind == "resnet" and case.name in MOVING and not keeps


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_do_what_one_does(case: Case, verdicts: dict[str, Any]) -> None:
    verdict = verdicts[str(case)]
    if _is_refused(case):
        assert verdict == {"refused": SENTENCE}
        return
    assert "error" not in verdict and "refused" not in verdict, verdict
    assert verdict["apart"] == 0, "both processes have the same bits"
    assert verdict["difference"] < TOLERANCE, verdict["place"]
    assert verdict["numbers"] > 3 and verdict["dtypes"] == ["torch.float64"]
