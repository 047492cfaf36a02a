"""Rows of a pass from several processes stand in the order of the pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everlora.methods.gathering import gather_rows


class Three:
    """Three processes, of which this is the first and the others' states are known."""

    def __init__(self, *others: dict[str, Any]) -> None:
        self.others = others

    def sum(self, values: Tensor) -> Tensor:
        raise AssertionError("rows are not summed")

    def gather(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(state), *self.others]


def test_batches_go_round_the_processes() -> None:
    others = (
        {"rows": torch.tensor([[2.0], [3.0], [9.0]]), "sizes": {"rows": [2, 1]}},
        {"sizes": {}},  # the pass ended before a batch was left for it
    )
    own = [torch.tensor([[0.0], [1.0]]), torch.empty(0, 1), torch.tensor([[10.0]])]
    found = gather_rows(Three(*others), {"rows": own})
    assert found["rows"].flatten().tolist() == [0, 1, 2, 3, 9, 10]
    assert gather_rows(Three({"sizes": {}}, {"sizes": {}}), {"rows": []}) == {}
