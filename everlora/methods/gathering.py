"""Rows that a pass over data gathered, of all processes and in the order of the pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everlora.methods.base import Together

__all__ = ["gather_rows"]


def gather_rows(processes: Together, batches: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Put together what was kept of each batch, in each process the rows of all, as one process would have them.

    Args:
        processes: those that went through the pass.
        batches: name to `(m, ...)` rows of each batch that this process visited, on the CPU; m may be 0.

    Returns:
        Name to `(n, ...)`; empty where no process visited a batch.
    """
    own: dict[str, object] = {name: torch.cat(list(rows)) for name, rows in batches.items() if rows}
    sizes = {name: [len(part) for part in rows] for name, rows in batches.items() if rows}
    states = processes.gather({**own, "sizes": sizes})
    gathered: dict[str, Tensor] = {}
    for name in batches:
        # the batches went round: one for each process, and again
        parts = [torch.split(state[name], state["sizes"][name]) for state in states if name in state]
        rounds = range(max((len(part) for part in parts), default=0))
        in_order = [part[number] for number in rounds for part in parts if number < len(part)]
        if in_order:
            gathered[name] = torch.cat(in_order)
    return gathered
