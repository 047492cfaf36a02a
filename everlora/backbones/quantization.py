"""Weights in 4 or 8 bits, through bitsandbytes where it is installed (extra `quant`)."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from everlora.errors import OptionError, UnsupportedError, nearest

__all__ = [
    "QUANTIZATIONS",
    "chosen_quantization",
    "is_quantized",
    "prepare_quantized",
    "quantization_options",
]

QUANTIZATIONS = ("none", "4bit", "8bit")
_TRIAL_WIDTH = 64  # the smallest block of 4-bit weights
# From here bitsandbytes says, once for each product, that 8-bit products round their inputs.
_NOISY_LOGGER = "bitsandbytes.autograd._functions"
_MISSING = "needs bitsandbytes, which is not installed; run `pip install everlora[quant]`, or leave quantization out"


def quantization_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` is given for quantised weights; nothing for `"none"`.

    Args:
        name: one of `QUANTIZATIONS`; `"4bit"` is NF4 with double quantisation, as QLoRA has it.
        dtype: in which products are computed.

    Raises:
        OptionError: an unknown name.
        UnsupportedError: bitsandbytes is not installed, or cannot train through such weights on this machine.
    """
    if name not in QUANTIZATIONS:
        raise OptionError(f"unknown quantization {name!r}; {nearest(name, QUANTIZATIONS)}")
    if name == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"quantization={name} {_MISSING}")
    device = _device_of_weights()
    reason = _obstacle(name, device)
    if reason is not None:
        other = "" if device == "cuda" else "on a machine with CUDA, "
        raise UnsupportedError(
            f"quantization={name} cannot be trained through on {device} here ({reason}); use it {other}with a newer "
            "bitsandbytes, or leave it out"
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


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded a model with quantised weights, of whatever kind."""
    return getattr(model, "hf_quantizer", None) is not None


def chosen_quantization(model: Any) -> str:
    """Which of `QUANTIZATIONS` a model was loaded with; `"none"` also where the checkpoint itself is quantised."""
    if not is_quantized(model) or model.hf_quantizer.pre_quantized:
        return "none"
    return "4bit" if model.hf_quantizer.quantization_config.load_in_4bit else "8bit"


def prepare_quantized(model: nn.Module) -> None:
    """Let gradients pass through quantised weights also after the model was used for predictions; call it once loaded.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first prediction, and products with repacked
    weights have no gradient: layers below would silently learn nothing. That is switched off. Its notice that 8-bit
    products round their inputs, one line for each product, is silenced.

    Args:
        model: as loaded; nothing happens to one without such layers.
    """
    if not is_quantized(model):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    _silence_notices()


def _silence_notices() -> None:
    logging.getLogger(_NOISY_LOGGER).addFilter(_is_no_cast_notice)  # the same filter is added but once


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def _device_of_weights() -> str:
    """Where transformers puts quantised weights unless told otherwise."""
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


@cache
def _obstacle(name: str, device: str) -> str | None:
    """Say why one small product and its gradient cannot be had with such weights; None where they can.

    Releases differ in the devices they know, and a build may lack its native part: trying is the only sure way.
    """
    try:
        # Heavy, optional, and loads native code.
        import bitsandbytes

        _silence_notices()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            layer = _quantized_layer(bitsandbytes.nn, name).to(device)
            x = torch.ones(2, _TRIAL_WIDTH, device=device, requires_grad=True)
            for mode in (True, False):
                layer.train(mode)(x).sum().backward()
    except Exception as error:  # whatever it raises, it is the answer
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None if x.grad is not None and bool(x.grad.isfinite().all()) else "its gradients are not finite"


def _quantized_layer(kinds: Any, name: str) -> nn.Module:
    sizes = {"input_features": _TRIAL_WIDTH, "output_features": _TRIAL_WIDTH, "bias": False}
    if name == "4bit":
        layer: nn.Module = kinds.Linear4bit(**sizes, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = kinds.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=6.0)
    return layer
