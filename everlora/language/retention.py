"""Text that a model wrote before it was trained, kept to see later how much of what it knew it has lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everlora.backbones import Backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.tokens import EncodedTokens, token_dtype
from everlora.errors import OptionError, UnsupportedError
from everlora.language.passes import evaluating, forward, head_of, language_model
from everlora.streams.keyed import keyed_bits

__all__ = ["retention_rows"]

_BITS = 53  # of a float64's fraction


def retention_rows(
    backbone: Backbone, *, count: int = 256, max_tokens: int = 256, seed: int = 0, batch_size: int = 64
) -> EncodedTokens:
    """Sample rows from a model as it is, at temperature 1 and from the whole vocabulary.

    The cross-entropy of a trained model on these rows, less that of the model they come from, estimates the divergence
    `KL(model || trained)` per token without bias, so its floor is known. Call it before anything is trained.

    Args:
        backbone: a causal language model.
        count: rows.
        max_tokens: longest row, the first token included, which is bos (eos where there is no bos) and not scored. A
            row ends after its eos, which is scored.
        seed: with a row's number the key of all its draws, so that neither `batch_size` nor what ran before has a say
            in them; rounding may still turn a draw that falls between two tokens.
        batch_size: rows in a forward pass.

    Returns:
        The rows; their bytes are those of the decoded text.

    Raises:
        ModelError: the model is no language model.
        OptionError: a number is too small, or rows are longer than the model has positions.
        UnsupportedError: the tokenizer has neither bos nor eos to begin with.

    Source: section 13 of the reference on I-LoRA.
    """
    model = language_model(backbone)
    _check(model, count=count, max_tokens=max_tokens, batch_size=batch_size)
    start = model.inputs.eos if model.inputs.bos is None else model.inputs.bos
    if start is None:
        raise UnsupportedError("the tokenizer has neither bos nor eos, so there is nothing to begin a row with")
    rows: list[NDArray[np.int64]] = []
    with evaluating(model):
        for ids in torch.split(torch.arange(count), batch_size):
            bits = keyed_bits(ids, max_tokens - 1, "retention", seed)
            draws = ((bits >> (64 - _BITS)) & ((1 << _BITS) - 1)).double() * 2.0**-_BITS
            rows += _sample(model, start, draws.to(model.device))
    return _encoded(model, rows)


def _sample(backbone: CausalLMBackbone, start: int, draws: Tensor) -> list[NDArray[np.int64]]:
    """Sample one row for each row of `draws`, `(n, steps)` in [0, 1)."""
    count, steps = draws.shape
    head, cache = head_of(backbone), None
    written = torch.full((count, steps + 1), start, device=backbone.device)
    is_open = torch.ones(count, dtype=torch.bool, device=backbone.device)
    lengths = torch.full((count,), steps + 1, device=backbone.device)
    for step in range(steps):
        mask = torch.ones(count, step + 1, dtype=torch.long, device=backbone.device)
        positions = torch.full((count, 1), step, device=backbone.device)
        states, cache = forward(backbone, written[:, step : step + 1], mask, positions, cache)
        written[:, step + 1] = _draw(head.logits(states[:, -1]), draws[:, step])
        is_end = is_open & (written[:, step + 1] == backbone.inputs.eos)
        lengths[is_end] = step + 2
        is_open &= ~is_end
        if not bool(is_open.any()):
            break
    return [row[:length].cpu().numpy() for row, length in zip(written, lengths.tolist(), strict=True)]


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function: the first token whose cumulated probability exceeds `uniform`, `(n,)`."""
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = (uniform * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _encoded(backbone: CausalLMBackbone, rows: list[NDArray[np.int64]]) -> EncodedTokens:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return EncodedTokens(
        token_ids=np.concatenate(rows).astype(token_dtype(backbone.vocab_size)),
        offsets=offsets,
        prompt_lengths=np.ones(len(rows), dtype=np.int32),
        num_bytes=np.array([len(backbone.inputs.decode(row[1:]).encode("utf-8")) for row in rows], dtype=np.int64),
        ids=np.arange(len(rows), dtype=np.int64),
    )


def _check(backbone: CausalLMBackbone, **numbers: Any) -> None:
    for name, value in numbers.items():
        least = 2 if name == "max_tokens" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"expected {name} as a whole number, {least} or more, found {value!r}")
    model: Any = backbone.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and numbers["max_tokens"] > limit:
        raise OptionError(
            f"expected max_tokens of at most {limit}, the positions of the model, found {numbers['max_tokens']}"
        )
