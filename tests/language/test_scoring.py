"""Cross-entropy: against the model's own loss, and free of batches, padding and blocks of the vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from everlora.backbones import load_backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.tokens import EncodedTokens
from everlora.errors import DataError, ModelError
from everlora.language import LanguageEvaluator, score_encoded, scoring
from everlora.results import LanguageScore
from tests.backbones.language_builders import BOS
from tests.language.builders import adapt, load, rows, trainer_of
from tests.tiny_models import save_tiny

TASKS = [
    {"instruction": "say hello", "output": "hello"},
    {"instruction": "a much longer question than the others", "output": "no"},
    {"instruction": "x", "output": "an answer of many more tokens"},
    {"instruction": "say", "output": "ü"},
    {"instruction": "two", "output": "2"},
]


def own_loss(backbone: CausalLMBackbone, encoded: EncodedTokens) -> tuple[float, int]:
    """Sum the loss that the model itself reports, one row at a time, without padding."""
    nll, tokens = 0.0, 0
    for index in range(len(encoded)):
        ids = torch.tensor(encoded.row(index).astype("int64"))[None]
        labels = ids.clone()
        labels[0, : int(encoded.prompt_lengths[index])] = -100
        with torch.no_grad():
            loss = backbone.model(input_ids=ids, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        nll, tokens = nll + float(loss) * count, tokens + count
    return nll, tokens


@pytest.mark.parametrize("adapted", [False, True])
def test_cross_entropy_is_the_models_own_loss_weighted_by_tokens(backbone: CausalLMBackbone, adapted: bool) -> None:
    before = LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS))
    if adapted:
        adapt(backbone)
    score = LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS))
    nll, tokens = own_loss(backbone, backbone.encode(rows(*TASKS).inputs))
    assert score.nll == pytest.approx(nll, rel=1e-5)
    assert (score.tokens, score.rows) == (tokens, len(TASKS))
    assert score.cross_entropy == pytest.approx(nll / tokens, rel=1e-5)
    assert (abs(score.nll - before.nll) > 1) == adapted


def test_tokens_weigh_and_not_rows_or_batches(backbone: CausalLMBackbone) -> None:
    evaluator = LanguageEvaluator(trainer_of(backbone))
    parts = [evaluator.score(rows(task)) for task in TASKS]
    whole = evaluator.score(rows(*TASKS))
    total: LanguageScore = sum(parts[1:], start=parts[0])
    assert whole.nll == pytest.approx(total.nll, rel=1e-5)
    assert whole.cross_entropy == pytest.approx(total.cross_entropy, rel=1e-5)
    mean_of_means = sum(part.cross_entropy for part in parts) / len(parts)
    assert abs(whole.cross_entropy - mean_of_means) > 1e-2


def test_bytes_are_those_of_the_answers(backbone: CausalLMBackbone) -> None:
    score = LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS))
    count = sum(len(task["output"].encode()) for task in TASKS)
    assert score.num_bytes == count
    assert score.tokens == count + len(TASKS)  # bytes are tokens here, and each answer ends in eos
    assert score.bits_per_byte == pytest.approx(score.nll / math.log(2) / count)


def test_batches_and_padding_do_not_matter(backbone: CausalLMBackbone) -> None:
    scores = [
        LanguageEvaluator(trainer_of(backbone, eval_batch_size=size)).score(rows(*TASKS)).nll for size in (1, 2, 5)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 700, 5_160])
def test_blocks_of_the_vocabulary_do_not_matter(
    backbone: CausalLMBackbone, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    whole = LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS)).nll
    largest: list[int] = []
    logits = scoring.LanguageHead.logits

    def counted(head: Any, states: torch.Tensor) -> torch.Tensor:
        largest.append(len(states))
        return logits(head, states)

    monkeypatch.setattr(scoring, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(scoring.LanguageHead, "logits", counted)
    assert LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS)).nll == pytest.approx(whole, rel=1e-6)
    assert max(largest) == {1: 1, 700: 2, 5_160: 20}[at_once]


def test_plain_text_is_scored_in_blocks_without_their_first_tokens(folder: Path) -> None:
    backbone = load(folder, block_size=8)
    examples = rows({"text": "0123456789"}, {"text": "abcd"})
    score = LanguageEvaluator(trainer_of(backbone)).score(examples)
    # <0123456|789><abc|d>: bos is no target, nor is what stands first in a block
    assert (score.rows, score.tokens, score.num_bytes) == (3, 7 + (3 + 3) + 1, 7 + (2 + 3) + 0)
    encoded = backbone.encode(examples.inputs)
    nll = 0.0
    for index in range(len(encoded)):
        ids = torch.tensor(encoded.row(index).astype("int64"))[None]
        with torch.no_grad():
            chances = backbone.model(input_ids=ids).logits.log_softmax(-1)[0]
        nll -= sum(float(chances[t - 1, ids[0, t]]) for t in range(1, ids.shape[1]) if ids[0, t] != BOS)
    assert score.nll == pytest.approx(nll, rel=1e-5)


def test_modes_and_random_numbers_stay(backbone: CausalLMBackbone) -> None:
    backbone.train()
    backbone.model.model.layers[0].eval()
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    LanguageEvaluator(trainer_of(backbone)).score(rows(*TASKS))
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_other_networks_and_empty_sets_are_refused(backbone: CausalLMBackbone, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows to score"):
        score_encoded(trainer_of(backbone), backbone.encode(rows(*TASKS).inputs).select([]))
    encoder = load_backbone(save_tiny("bert", tmp_path))
    with pytest.raises(ModelError, match="causal language model"):
        LanguageEvaluator(trainer_of(encoder))
