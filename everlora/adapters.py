"""Start a method from a LoRA adapter that PEFT wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from everlora.errors import StoreError, TargetError, nearest
from everlora.lowrank import split_factors
from everlora.methods.base import Method
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, from_peft_tensors, lora_scalings
from everlora.settings import Settings

__all__ = ["adapter_fingerprint", "adopt_adapter", "adopt_at_start", "read_adapter", "with_full_path"]

logger = logging.getLogger("everlora")


def read_adapter(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the factors of a PEFT adapter, in float32 on the CPU.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; a pickle is never read. A classifier that
            was saved beside the factors is left out.

    Returns:
        Layer name to `(down, up)`, `(rank, in)` and `(out, rank)`, PEFT's scaling inside `up`; kernels of convolutions
        as rows.

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
            "start_from names such a folder"
        ) from error
    if not isinstance(config, Mapping):
        raise StoreError(f"expected a JSON object in {folder / ADAPTER_CONFIG}; the file is damaged")
    factors = from_peft_tensors({name: tensor.float() for name, tensor in tensors.items() if "lora_" in name})
    scalings = lora_scalings(config, {name: len(down) for name, (down, _) in factors.items()})
    left_out = len(tensors) - 2 * len(factors)
    if left_out:
        logger.info("%d tensors of %s are no low-rank factors and are left out", left_out, folder)
    return {name: (down.flatten(1), up.flatten(1) * scalings[name]) for name, (down, up) in factors.items()}


def adopt_adapter(method: Method, model: nn.Module, folder: str | Path) -> None:
    """Let a newly made method start from an adapter.

    Args:
        method: with its layers in place.
        model: the encoder; where the adapter was made for a larger model that holds it, such as a classifier, the
            first component of its layers' names is dropped.
        folder: of the adapter.

    Raises:
        TargetError: a layer of the adapter is not in the model, or not among those that the method adapts.
        UnsupportedError: the method cannot start from an adapter, or the adapter is no plain LoRA.
        StoreError: the adapter cannot be read.
        ShapeError: factors that do not fit their layer.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    factors = {}
    for name, pair in read_adapter(folder).items():
        inner = next((n for n in (name, name.partition(".")[2]) if n in known), None)
        if inner is None:
            raise TargetError(
                f"the adapter in {folder} changes layer '{name}', which the model has not; {nearest(name, known)}"
            )
        factors[inner] = pair
    method.adopt(split_factors(model, factors))


def adapter_fingerprint(folder: str | Path) -> str:
    """Sha256 of an adapter's two files."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def with_full_path(settings: Settings) -> Settings:
    """Let `start_from` hold wherever the program runs next."""
    start = settings.learner.start_from
    if start is None:
        return settings
    learner = dataclasses.replace(settings.learner, start_from=str(Path(start).resolve()))
    return dataclasses.replace(settings, learner=learner)


def adopt_at_start(
    settings: Settings, method: Method, model: nn.Module, header: Mapping[str, Any] | None = None
) -> str | None:
    """Adopt the adapter that the settings name, if they name one.

    Args:
        settings: of the learner.
        method: newly made.
        model: its encoder.
        header: of the learner's directory, once it is made; holds the fingerprint to compare with.

    Returns:
        The adapter's fingerprint.

    Raises:
        StoreError: the adapter is missing, damaged or another one.
    """
    start = settings.learner.start_from
    if start is None:
        return None
    adopt_adapter(method, model, start)
    found = adapter_fingerprint(start)
    if header is not None and found != header["start_from_sha256"]:
        raise StoreError(
            f"expected the adapter that the learner was made with in {start}, found another; put it back until the "
            "first task is learned"
        )
    return found
