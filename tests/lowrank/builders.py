"""What several test files of this folder build on."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmm_"}


class CountProducts(TorchDispatchMode):
    """Collects the shapes of all matrix products that run inside the block."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2][-2:]
            self.shapes.append(tuple(tuple(m.shape) for m in matrices))
        return func(*args, **(kwargs or {}))


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
