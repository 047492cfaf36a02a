"""Contexts that keep matrix products in the precision they were written in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "full_precision", "normal_mode", "without_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast would run a product of `x`, or None where it would leave `x` alone."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Run the block with autocast switched off for `device`; free when it is off already."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run the block without autocast and without reduced-precision float32 products (TF32, bf16 emulation)."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with without_autocast(device):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


@contextmanager
def normal_mode() -> Iterator[None]:
    """Run the block without gradients, making ordinary tensors even inside `torch.inference_mode()`.

    A tensor made in inference mode may never be written outside it, so anything kept between calls is made here.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
