"""Likelihood of each possible answer: classification by a language model, with nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.language_inputs import LanguageInputs
from everlora.backbones.tokenised import tokenise
from everlora.errors import DataError
from everlora.language.passes import evaluating, forward, head_of, language_model, select_rows
from everlora.language.scoring import token_nll
from everlora.streams.dialogue_rows import write_row
from everlora.training import TaskTrainer

__all__ = ["LabelScores", "label_scores"]

Tokens = tuple[int, ...]
_EMPTY_PROMPT = write_row({"instruction": "", "input": ""})


@dataclass(frozen=True)
class LabelScores:
    """How likely each possible answer to one prompt is.

    Attributes:
        labels: the possible answers, each once, in the order of the row.
        scores: `(k,)` float64: log-likelihood, nats, or what the options made of it.
    """

    labels: tuple[str, ...]
    scores: NDArray[np.float64]

    @property
    def best(self) -> str:
        """The answer with the greatest score, the first of equals."""
        return self.labels[int(self.scores.argmax())]

    @property
    def probabilities(self) -> dict[str, float]:
        """Softmax of the scores, best first, the first of equals first."""
        weights = np.exp(self.scores - self.scores.max())
        shares = weights / weights.sum()
        return {self.labels[index]: float(shares[index]) for index in np.argsort(-shares, kind="stable").tolist()}


def label_scores(
    trainer: TaskTrainer, rows: Sequence[Mapping[str, Any]], *, length_norm: bool = False, pmi: bool = False
) -> list[LabelScores]:
    """Score every string of each row's `label_set` by the log-probability of its tokens after the prompt.

    The prompt is read once; all its labels share what attention kept of it. Where the tokens of one label begin those
    of another, the token that ends an answer counts for all labels of the row, or the longer one could never win.

    Args:
        trainer: the pipeline of the model.
        rows: what `everlora.streams.parse_row` returned, each with a `label_set`; answers are not looked at.
        length_norm: divide by the number of tokens that are scored.
        pmi: subtract the same log-probability after a prompt with nothing in it (pointwise mutual information).

    Returns:
        One result per row, in order.

    Raises:
        DataError: a label set is empty, a label has no tokens or too many, or a prompt has none.
        ModelError: the model is no language model.

    Source: section 9 of the reference on I-LoRA.
    """
    backbone = language_model(trainer.backbone)
    labels = [tuple(dict.fromkeys(row.get("label_set") or ())) for row in rows]
    candidates = _candidates(backbone.inputs, labels)
    reserve = max((len(tokens) for row in candidates for tokens in row), default=0)
    prompts = backbone.inputs.encode_prompts([write_row(row) for row in rows], reserve=reserve)
    sets = list(dict.fromkeys(zip(labels, candidates, strict=True))) if pmi else []
    if pmi:
        prompts += backbone.inputs.encode_prompts([_EMPTY_PROMPT], reserve=reserve) * len(sets)
    sums = _log_likelihoods(trainer, prompts, [*candidates, *(tokens for _, tokens in sets)])
    prior = {names: values for (names, _), values in zip(sets, sums[len(rows) :], strict=True)}
    results = []
    for names, tokens, values in zip(labels, candidates, sums[: len(rows)], strict=True):
        scores = values - prior[names] if pmi else values
        lengths = np.array([len(part) for part in tokens], dtype=np.float64)
        results.append(LabelScores(names, scores / lengths if length_norm else scores))
    return results


def _candidates(inputs: LanguageInputs, labels: Sequence[tuple[str, ...]]) -> list[tuple[Tokens, ...]]:
    """Tokenise the labels of each row; those of equal label sets are equal."""
    names = list(dict.fromkeys(name for row in labels for name in row))
    tokens = dict(zip(names, (tuple(part.ids.tolist()) for part in tokenise(inputs.tokenizer, names)), strict=True))
    known = {row: _with_ends([tokens[name] for name in row], inputs.eos) for row in dict.fromkeys(labels)}
    for row, candidates in known.items():
        if not candidates:
            raise DataError("a row has an empty 'label_set'; write its possible answers there")
        for name, part in zip(row, candidates, strict=True):
            if not 0 < len(part) <= inputs.max_length - 2:
                raise DataError(
                    f"label {name[:40]!r} has {len(part)} tokens, but one to {inputs.max_length - 2} fit behind a "
                    "prompt; change the label or raise max_length"
                )
    return [known[row] for row in labels]


def _with_ends(candidates: Sequence[Tokens], end: int | None) -> tuple[Tokens, ...]:
    ordered = sorted(set(candidates))  # a beginning of others stands right before the first of them
    begins = any(after[: len(before)] == before for before, after in pairwise(ordered))
    return tuple((*part, end) if begins and end is not None else part for part in candidates)


def _log_likelihoods(
    trainer: TaskTrainer, prompts: Sequence[list[int]], candidates: Sequence[tuple[Tokens, ...]]
) -> list[NDArray[np.float64]]:
    """Sum the log-probabilities of each candidate's tokens after its prompt."""
    if not all(prompts):
        raise DataError("a prompt has no tokens, so nothing comes before its labels; give every row an instruction")
    backbone = language_model(trainer.backbone)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    count = trainer.options.eval_batch_size
    result: dict[int, NDArray[np.float64]] = {}
    with evaluating(backbone), trainer.autocast():
        for start in range(0, len(order), count):
            rows = order[start : start + count]
            chosen = [candidates[row] for row in rows]
            sums = _batch(backbone, [prompts[row] for row in rows], chosen, count)
            for place, row in enumerate(rows):
                result[row] = np.array([sums[place, tokens] for tokens in candidates[row]], dtype=np.float64)
            trainer.progress("labels", min(start + count, len(order)), len(order))
    return [result[row] for row in range(len(prompts))]


def _batch(
    backbone: CausalLMBackbone, prompts: list[list[int]], candidates: Sequence[tuple[Tokens, ...]], count: int
) -> dict[tuple[int, Tokens], float]:
    """Do the same for one batch; the keys are the place in the batch and the tokens.

    Equal tokens after one prompt are computed once, lest rounding tell them apart.
    """
    batch = backbone.inputs.collate_prompts(prompts, device=backbone.device)
    mask = batch["attention_mask"]
    states, cache = forward(backbone, batch["input_ids"], mask, batch["position_ids"])
    last, head = states[:, -1], head_of(backbone)
    pairs = [(place, tokens) for place, row in enumerate(candidates) for tokens in dict.fromkeys(row)]
    pairs.sort(key=lambda pair: len(pair[1]))
    sums: dict[tuple[int, Tokens], float] = {}
    for start in range(0, len(pairs), count):
        some = pairs[start : start + count]
        rows = torch.tensor([place for place, _ in some], device=backbone.device)
        firsts = torch.tensor([tokens[0] for _, tokens in some], device=backbone.device)
        values = -token_nll(head, last[rows], firsts).cpu().double()
        if max(len(tokens) for _, tokens in some) > 1:
            follow = [tokens for _, tokens in some]
            values += _following(backbone, select_rows(cache, rows), mask[rows], follow)
        sums |= dict(zip(some, values.tolist(), strict=True))
    return sums


def _following(backbone: CausalLMBackbone, cache: Any, mask: Tensor, candidates: Sequence[Tokens]) -> Tensor:
    """Sum the log-probabilities of all tokens but the first of each candidate, `(m,)` float64.

    Args:
        backbone: the model.
        cache: of each candidate's prompt; it is used up.
        mask: `(m, T)` of the prompts.
        candidates: m of them.
    """
    width = max(len(tokens) for tokens in candidates)
    lengths = torch.tensor([len(tokens) for tokens in candidates])
    padded = torch.tensor([[*tokens, *[backbone.inputs.pad] * (width - len(tokens))] for tokens in candidates])
    is_scored = torch.arange(1, width)[None] < lengths[:, None]
    tokens, scored = padded.to(mask.device), is_scored.to(mask.device)
    positions = mask.sum(dim=1, keepdim=True) + torch.arange(width - 1, device=mask.device)[None]
    whole = torch.cat([mask, scored.to(mask.dtype)], dim=1)
    states, _ = forward(backbone, tokens[:, :-1], whole, positions * scored, cache)
    losses = torch.zeros(is_scored.shape, dtype=torch.float64)
    losses[is_scored] = token_nll(head_of(backbone), states[scored], tokens[:, 1:][scored]).cpu().double()
    return -losses.sum(dim=1)
