"""The peak of a task is its own, not that of what ran before in the process."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from everlora.training import peak_memory
from everlora.training.peak_memory import peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")
HALF = 60_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_a_reset_forgets_what_was_freed() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    block = np.ones(2 * HALF, dtype=np.uint8)
    during = peak_memory_bytes(CPU)
    assert during >= before + HALF
    del block
    assert peak_memory_bytes(CPU) >= during - HALF / 10, "what was freed still counts"
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) <= during - HALF


def test_without_the_systems_files_the_peak_of_the_process_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "nothing")
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path)
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) > 1e7
