"""Cross-entropy of tokens, weighted by tokens, and with the bytes they stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everlora.backbones.tokens import EncodedTokens
from everlora.errors import DataError
from everlora.heads import LanguageHead
from everlora.language.passes import evaluating, head_of, language_model
from everlora.results import LanguageScore
from everlora.training import TaskData, TaskTrainer

__all__ = ["score_encoded", "token_nll"]

_SCORES_AT_ONCE = 1 << 24
"""Scores over the vocabulary that are held at a time, 64 MiB of float32."""


def token_nll(head: LanguageHead, states: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of one token after each hidden state.

    The scores of all tokens of the vocabulary exist for some of the rows at a time.

    Args:
        head: the model's output layer.
        states: `(N, d)` last hidden states.
        tokens: `(N,)` the tokens that follow.

    Returns:
        `(N,)` float32, nats.
    """
    if not len(tokens):
        return torch.zeros(0, device=states.device)
    width = head.logits(states[:1]).shape[-1]
    count = max(1, _SCORES_AT_ONCE // width)
    parts = zip(torch.split(states, count), torch.split(tokens, count), strict=True)
    return torch.cat([nn.functional.cross_entropy(head.logits(x), y, reduction="none") for x, y in parts])


def score_encoded(trainer: TaskTrainer, encoded: EncodedTokens) -> LanguageScore:
    """Measure the cross-entropy of encoded rows, with the weights that are in place.

    Args:
        trainer: the pipeline of the model.
        encoded: rows of prompt and answer, or blocks of plain text.

    Returns:
        The sum over all supervised tokens, so that its mean does not depend on how rows are batched.

    Raises:
        DataError: there are no rows.
        ModelError: the model is no language model.

    Source: section 9 of the reference on I-LoRA.
    """
    if not len(encoded):
        raise DataError("there are no rows to score; give at least one with an answer or a text")
    data = TaskData(encoded, torch.zeros(len(encoded), dtype=torch.long), torch.as_tensor(encoded.ids))
    head = head_of(language_model(trainer.backbone))
    nll, tokens = 0.0, 0
    with trainer.processes.together(), evaluating(trainer.backbone):
        for _, batch in trainer.encode(data, "score"):
            if batch.features is None:
                continue
            following = batch.labels[:, 1:]
            places = following != -100
            losses = token_nll(head, batch.features[:, :-1][places], following[places])
            nll += float(losses.cpu().double().sum())
            tokens += len(losses)
    sums = trainer.processes.sum(torch.tensor([nll, tokens], dtype=torch.float64)).tolist()  # of rows of their own
    nll, tokens = sums[0], int(sums[1])
    return LanguageScore(nll, tokens, int(encoded.num_bytes.sum()), len(encoded))
