"""Greedy generation: always the likeliest token, whatever the folder of the model says about sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import accepts
from everlora.errors import DataError, OptionError
from everlora.language.passes import evaluating

__all__ = ["USUAL_NEW_TOKENS", "Written", "check_max_new_tokens", "ends_of", "write"]

USUAL_NEW_TOKENS = 64
"""How long an answer may be where nobody says: a learner's own option has this value, too."""


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt.

    Attributes:
        tokens: the new tokens, without the one that ends an answer.
        text: these as text, special tokens left out.
        log_probability: of all new tokens together, and of the end where there is one, nats.
    """

    tokens: tuple[int, ...]
    text: str
    log_probability: float


def check_max_new_tokens(backbone: CausalLMBackbone, value: Any) -> int:
    """Return `value`, checked: some of the longest row must be left for a prompt.

    The usual number becomes half of the longest row where it leaves no room: a learner with a small `max_length` can
    then be asked without further options.

    Raises:
        OptionError: it is another than the usual one, and no whole number from 1 to the longest row less two.
    """
    most = backbone.max_length - 2
    if value == USUAL_NEW_TOKENS > most > 0:
        value = backbone.max_length // 2
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise OptionError(
            f"expected max_new_tokens as a whole number between 1 and {most}, which leaves room for a prompt within "
            f"max_length={backbone.max_length}, found {value!r}"
        )
    return value


def write(
    backbone: CausalLMBackbone,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Written]:
    """Go on from prompts, greedily, until the end token or so many tokens.

    Prompts of like length are padded on the left together; padding does not change what is written but for float
    rounding.

    Args:
        backbone: the model, with whatever adapters are in place.
        prompts: token ids of each, as `LanguageInputs.encode_prompts` returns them.
        max_new_tokens: longest answer.
        batch_size: prompts in a batch.
        progress: called as `progress("generate", done, total)`.

    Returns:
        One result per prompt, in order.

    Raises:
        DataError: a prompt has no tokens.
    """
    if not all(len(prompt) for prompt in prompts):
        raise DataError("a prompt has no tokens, so there is nothing to go on from; give every row an instruction")
    ends = ends_of(backbone)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    result: dict[int, Written] = {}
    with evaluating(backbone), _plain_settings(backbone, max_new_tokens, ends):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens, log_probabilities = _continue(backbone, [prompts[row] for row in rows])
            for row, new, terms in zip(rows, tokens.tolist(), log_probabilities.tolist(), strict=True):
                result[row] = _written(backbone, new, terms, ends)
            progress("generate", min(start + batch_size, len(order)), len(order))
    return [result[row] for row in range(len(prompts))]


class _Recorder(LogitsProcessor):  # type: ignore[misc]
    """Notes the log-probability of the likeliest token at each step, which is the one that is taken."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = scores.float()
        self.steps.append(values.amax(dim=-1) - values.logsumexp(dim=-1))
        return scores


def _continue(backbone: CausalLMBackbone, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the new tokens and their log-probabilities, both `(n, steps)`."""
    model: Any = backbone.model
    batch = backbone.inputs.collate_prompts(prompts, device=backbone.device)
    if not accepts(model.forward, "position_ids"):
        del batch["position_ids"]
    recorder = _Recorder()
    whole = model.generate(
        **batch, generation_config=model.generation_config, logits_processor=LogitsProcessorList([recorder])
    )
    return whole[:, batch["input_ids"].shape[1] :].cpu(), torch.stack(recorder.steps, dim=1).cpu()


def _written(backbone: CausalLMBackbone, new: list[int], terms: list[float], ends: frozenset[int]) -> Written:
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    tokens = new[:length]
    return Written(tuple(tokens), backbone.inputs.decode(tokens), sum(terms[: length + 1]))


def ends_of(backbone: CausalLMBackbone) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's, which training uses, and those the model was made with."""
    model: Any = backbone.model
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(token) for token in (*ids, backbone.inputs.eos) if token is not None)


@contextmanager
def _plain_settings(backbone: CausalLMBackbone, max_new_tokens: int, ends: frozenset[int]) -> Iterator[None]:
    """Put greedy settings in the place of the model's own.

    Handing them to `generate` would not do: what they leave open it takes from the model's, penalties and sampling
    included.
    """
    model: Any = backbone.model
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        bos_token_id=backbone.inputs.bos,
        eos_token_id=sorted(ends) or None,
        pad_token_id=backbone.inputs.pad,
    )
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
