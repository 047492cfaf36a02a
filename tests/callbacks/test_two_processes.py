"""Two processes of torchrun compute what one computes on the same rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from everlora.callbacks import EverloraCallback, ILoraArguments, everlora_trainer
from tests.callbacks.builders import lora_model, rows, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft of transformers
]

REPOSITORY = Path(__file__).resolve().parents[2]


def run(shared: Path, states: Path, out: Path, processes: int) -> list[dict[str, Any]]:
    out.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    command = [sys.executable, *launch, str(REPOSITORY / "tests" / "callbacks" / "two_processes.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    arguments = [*command, str(shared), str(states), str(out)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_equal_one(shared: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    first = trainer(
        lora_model(shared),
        tmp_path,
        rows(16),
        cls=everlora_trainer(Trainer),
        extra={"ilora": ILoraArguments(ema_alpha=0.9)},
    )
    first.train()
    first.save_adapters(states / "i_lora")
    for method in ("ewc", "o_lora"):
        callback = EverloraCallback(method, fisher_samples=8) if method == "ewc" else EverloraCallback(method)
        trainer(lora_model(shared, moved=True), tmp_path, rows(16), extra={"callbacks": [callback]}).train()
        callback.save(states / method)
    (alone,) = run(shared, states, tmp_path / "one", 1)
    left, right = run(shared, states, tmp_path / "two", 2)
    assert left.keys() == right.keys() == alone.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name, value in alone.items():
        torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5)
