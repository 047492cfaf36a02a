"""Weights in 4 or 8 bits, through bitsandbytes where it is installed (extra `quant`)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers

from everlora.errors import OptionError, UnsupportedError, nearest

__all__ = ["QUANTIZATIONS", "quantization_options"]

QUANTIZATIONS = ("none", "4bit", "8bit")


def quantization_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` is given for quantised weights; nothing for `"none"`.

    Args:
        name: one of `QUANTIZATIONS`; `"4bit"` is NF4 with double quantisation, as QLoRA has it.
        dtype: in which products are computed.

    Raises:
        OptionError: an unknown name.
        UnsupportedError: bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise OptionError(f"unknown quantization {name!r}; {nearest(name, QUANTIZATIONS)}")
    if name == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError(
            f"quantization={name} needs bitsandbytes, which is not installed; run `pip install everlora[quant]`, or "
            "leave quantization out"
        )
    settings: dict[str, Any] = {"load_in_8bit": True}
    if name == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"quantization_config": transformers.BitsAndBytesConfig(**settings)}
