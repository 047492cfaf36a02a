"""Passes of a language model that keep what attention has seen, for answers that go on from a prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from everlora.backbones import Backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import accepts
from everlora.errors import ModelError, UnsupportedError
from everlora.heads import LanguageHead

__all__ = ["evaluating", "forward", "head_of", "language_model", "select_rows"]


def language_model(backbone: Backbone) -> CausalLMBackbone:
    """Return the backbone itself, known to be a causal language model.

    Raises:
        ModelError: it is another network.
    """
    if not isinstance(backbone, CausalLMBackbone):
        raise ModelError(
            f'expected a causal language model, found {backbone.architecture}; load the model with kind="causal_lm"'
        )
    return backbone


def head_of(backbone: CausalLMBackbone) -> LanguageHead:
    """Return the output layer that the model has now."""
    return LanguageHead(backbone.output_head)


@contextmanager
def evaluating(backbone: Backbone) -> Iterator[None]:
    """Run the body in evaluation mode and without gradients; modes and random states are as before afterwards."""
    modes = [(module, module.training) for module in backbone.modules()]
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    try:
        backbone.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training


def forward(
    backbone: CausalLMBackbone, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any = None
) -> tuple[Tensor, Any]:
    """Compute the hidden states of tokens that follow those in the cache.

    Args:
        backbone: the model.
        tokens: `(n, T)` int64.
        mask: `(n, cached + T)` int64, 0 where there is padding.
        positions: `(n, T)` int64.
        cache: what an earlier call returned for the same rows; it grows by these tokens. None at the start.

    Returns:
        The last hidden states `(n, T, d)` float32 after the final norm, and the cache.

    Raises:
        UnsupportedError: the model keeps no cache whose rows can be chosen.
    """
    model: Any = backbone.model
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
    if accepts(model.forward, "position_ids"):
        arguments["position_ids"] = positions
    outputs = model.base_model(**arguments, use_cache=True)
    kept = getattr(outputs, "past_key_values", None)
    if not hasattr(kept, "layers"):
        raise UnsupportedError(
            f"expected a model that returns a cache of its attention, found {type(model).__name__} without; its labels "
            "and samples cannot be scored step by step, so leave them out"
        )
    return outputs.last_hidden_state.float(), kept


def select_rows(cache: Any, rows: Tensor) -> Any:
    """Return a cache of the given rows, in that order and as often as they are named; the one given stays as it is.

    Args:
        cache: what `forward` returned.
        rows: `(m,)` row numbers.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        # layers replace their tensors, but some keep them in dicts, which the copy would share
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
    chosen.reorder_cache(rows)
    return chosen
