"""Reading the two files of a PEFT adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from everlora.errors import StoreError
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, from_peft_tensors, lora_scalings

__all__ = ["Factors", "factors_and_scales", "read_factors"]

logger = logging.getLogger("everlora")

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer name to `(down, up)`, `(rank, in)` and `(out, rank)`, as stored: without the scaling; kernels as rows."""


def read_factors(folder: str | Path) -> tuple[Factors, dict[str, float]]:
    """Read the factors of a PEFT adapter, in float32 on the CPU, and what their products count with.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; a pickle is never read. A classifier that
            was saved beside the factors is left out.

    Raises:
        StoreError: a file is missing or damaged, or holds other tensors.
        UnsupportedError: the adapter is no plain LoRA.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"expected a PEFT adapter in {folder}, with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, found: {error}; "
            "name such a folder"
        ) from error
    if not isinstance(config, Mapping):
        raise StoreError(f"expected a JSON object in {folder / ADAPTER_CONFIG}; the file is damaged")
    return factors_and_scales(config, tensors, folder)


def factors_and_scales(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[Factors, dict[str, float]]:
    """Do what `read_factors` does, with what the two files hold."""
    halves = from_peft_tensors({name: tensor.float() for name, tensor in tensors.items() if "lora_" in name})
    left_out = len(tensors) - 2 * len(halves)
    if left_out:
        logger.info("%d tensors of %s are no low-rank factors and are left out", left_out, folder)
    scales = lora_scalings(config, {name: len(down) for name, (down, _) in halves.items()})
    return {name: (down.flatten(1), up.flatten(1)) for name, (down, up) in halves.items()}, scales
