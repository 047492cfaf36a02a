"""Start a method from a LoRA adapter that PEFT wrote."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.earlier_models import continue_earlier
from everlora.errors import OptionError, StoreError, TargetError, nearest
from everlora.lowrank import split_factors
from everlora.methods.base import Method
from everlora.methods.earlier import ContinuesEarlierModel
from everlora.peft_folders import read_factors
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from everlora.settings import Settings

__all__ = ["adapter_fingerprint", "adopt_adapter", "adopt_at_start", "read_adapter", "with_full_path"]


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
    factors, scales = read_factors(folder)
    return {name: (down, up * scales[name]) for name, (down, up) in factors.items()}


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
    """Let `start_from`, and options of the method that name a folder, hold wherever the program runs next."""
    start = settings.learner.start_from
    if start is not None:
        learner = dataclasses.replace(settings.learner, start_from=str(Path(start).resolve()))
        settings = dataclasses.replace(settings, learner=learner)
    options, kind = settings.method_options, settings.method.method_class
    paths = kind.path_options if issubclass(kind, ContinuesEarlierModel) else ()
    full = {name: str(Path(value).resolve()) for name in paths if (value := getattr(options, name)) is not None}
    return dataclasses.replace(settings, method_options=dataclasses.replace(options, **full)) if full else settings


def adopt_at_start(
    settings: Settings, method: Method, model: nn.Module, header: Mapping[str, Any] | None = None
) -> str | None:
    """Adopt the adapter that the settings name, or go on from the earlier run that the method's options name, if any.

    Args:
        settings: of the learner.
        method: newly made.
        model: its encoder.
        header: of the learner's directory, once it is made; holds the fingerprint to compare with.

    Returns:
        Fingerprint of what was adopted; None for nothing.

    Raises:
        StoreError: the adapter is missing, damaged or another one.
        OptionError: both are named, or what was found does not fit the options.
    """
    start, found = settings.learner.start_from, None
    if isinstance(method, ContinuesEarlierModel):
        if start is not None and method.earlier_folders() is not None:
            raise OptionError("start_from and previous_task_model both say where to start; name one of them.")
        base = None if header is None else header["base_sha256"]
        fit = method.encoder.inputs.fit if isinstance(method.encoder, CausalLMBackbone) else None
        found = continue_earlier(method, base_sha256=base, fit=fit)
    if start is not None:
        adopt_adapter(method, model, start)
        found = adapter_fingerprint(start)
    expected = None if header is None else header.get("start_from_sha256")
    if expected is not None and found != expected:
        raise StoreError(
            f"expected what the learner was made with in {start or 'previous_task_model'}, found another; put it back "
            "until the first task is learned"
        )
    return found
