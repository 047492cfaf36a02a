"""Peak memory of one task: what the device's allocator, or on a CPU the process, held at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["peak_memory_bytes", "reset_peak_memory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_THE_PEAK = "5"
_PEAK_LINE = "VmHWM:"


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement; where the system cannot do that, the peak is that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text(_FORGET_THE_PEAK)
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since the last reset: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # What getrusage says comes second: it knows no reset, and a process starts with its parent's peak.
    peak = _resident_peak()
    if peak is not None:
        return peak
    greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return greatest if sys.platform == "darwin" else 1024 * greatest


def _resident_peak() -> int | None:
    """Peak resident set in bytes as Linux tells it, None elsewhere."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(_PEAK_LINE)), None)
    return None if found is None else 1024 * int(found.split()[1])
