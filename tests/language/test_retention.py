"""Rows sampled from the base: keyed draws, the right distribution, and the figures of the reference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.tokens import EncodedTokens
from everlora.errors import OptionError
from everlora.language import LanguageEvaluator, retention_rows, score_encoded
from everlora.streams import load_dialogues, parse_row
from tests.backbones.language_builders import BOS, EOS
from tests.language.builders import adapt, load, trainer_of


def surprises(backbone: CausalLMBackbone, encoded: EncodedTokens) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each sampled token, and the entropy of what it was drawn from."""
    losses, entropies = [], []
    for index in range(len(encoded)):
        ids = torch.tensor(encoded.row(index).astype("int64"))
        with torch.no_grad():
            chances = backbone.model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-chances.gather(1, ids[1:, None])[:, 0])
        entropies.append(-(chances.exp() * chances).sum(-1))
    return torch.cat(losses).numpy(), torch.cat(entropies).numpy()


def excess(backbone: CausalLMBackbone, encoded: EncodedTokens) -> float:
    """How many standard errors the mean loss lies above the mean entropy; right draws give a standard normal."""
    losses, entropies = surprises(backbone, encoded)
    terms = losses - entropies
    return float(terms.mean() / (terms.std() / math.sqrt(len(terms))))


def test_rows_begin_with_bos_and_end_with_the_first_eos(backbone: CausalLMBackbone) -> None:
    rows = retention_rows(backbone, count=60, max_tokens=30, seed=1)
    assert len(rows) == 60
    ended = 0
    for index in range(60):
        row = rows.row(index).tolist()
        assert row[0] == BOS and len(row) <= 30
        assert EOS not in row[:-1]
        assert len(row) == 30 or row[-1] == EOS
        ended += row[-1] == EOS
        assert rows.num_bytes[index] == len(backbone.inputs.decode(row[1:]).encode())
    assert 0 < ended < 60
    assert rows.prompt_lengths.tolist() == [1] * 60
    score = score_encoded(trainer_of(backbone), rows)
    assert score.rows == 60
    # all but the first are scored; the model may draw bos, which begins a text and is not
    assert score.tokens == int((rows.lengths - 1).sum()) - int((rows.token_ids == BOS).sum()) + 60


def test_neither_batches_nor_random_numbers_drawn_before_have_a_say(backbone: CausalLMBackbone) -> None:
    first = retention_rows(backbone, count=10, max_tokens=20, seed=5)
    torch.rand(7)
    backbone.train()
    state = torch.get_rng_state()
    for size in (1, 4, 10):
        again = retention_rows(backbone, count=10, max_tokens=20, seed=5, batch_size=size)
        assert np.array_equal(again.token_ids, first.token_ids) and np.array_equal(again.offsets, first.offsets)
    assert torch.equal(torch.get_rng_state(), state)
    fewer = retention_rows(backbone, count=4, max_tokens=20, seed=5)
    assert np.array_equal(fewer.token_ids, first.select(range(4)).token_ids)
    assert not np.array_equal(retention_rows(backbone, count=4, max_tokens=20, seed=6).row(0), first.row(0))


def test_draws_follow_the_model(backbone: CausalLMBackbone) -> None:
    rows = retention_rows(backbone, count=150, max_tokens=20, seed=2)
    assert abs(excess(backbone, rows)) < 4
    firsts = np.array([rows.row(index)[1] for index in range(150)])
    with torch.no_grad():
        chances = backbone.model(input_ids=torch.tensor([[BOS]])).logits[0, -1].softmax(-1).numpy()
    top = int(chances.argmax())
    error = math.sqrt(chances[top] * (1 - chances[top]) / 150)
    assert abs((firsts == top).mean() - chances[top]) < 4 * error
    own = score_encoded(trainer_of(backbone), rows).cross_entropy
    adapt(backbone)
    assert score_encoded(trainer_of(backbone), rows).cross_entropy > own + 0.1
    assert excess(backbone, rows) > 8


def test_numbers_are_checked(backbone: CausalLMBackbone) -> None:
    for options in ({"count": 0}, {"max_tokens": 1}, {"batch_size": 0}, {"max_tokens": 129}):
        with pytest.raises(OptionError, match=next(iter(options))):
            retention_rows(backbone, **{"count": 2, "max_tokens": 8, "seed": 0, **options})


@pytest.mark.slow
def test_the_base_on_its_own_stories(shared: Path) -> None:
    backbone = load(shared / "models" / "stories260K", max_length=256)
    rows = retention_rows(backbone, count=256, max_tokens=256, seed=0, batch_size=256)
    score = score_encoded(trainer_of(backbone, eval_batch_size=64), rows)
    assert score.cross_entropy == pytest.approx(1.30, abs=0.05)
    assert score.num_bytes / score.tokens == pytest.approx(2.13, abs=0.05)
    assert score.bits_per_byte == pytest.approx(0.88, abs=0.04)
    # the floor: on text of its own, a model is as surprised as its own distribution says
    losses, entropies = surprises(backbone, rows)
    assert abs(excess(backbone, rows)) < 4
    assert losses.mean() == pytest.approx(score.cross_entropy, abs=1e-4)
    assert losses.mean() == pytest.approx(entropies.mean(), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nats", "bytes_a_token", "bits"),
    [("tinyshakespeare", 4.92, 1.60, 4.42), ("agnews", 4.84, 1.52, 4.61), ("gsm8k", 5.61, 1.51, 5.37)],
)
def test_the_base_on_other_domains(shared: Path, name: str, nats: float, bytes_a_token: float, bits: float) -> None:
    backbone = load(shared / "models" / "stories260K", max_length=512, block_size=256)
    folder = shared / "data" / name
    if name == "tinyshakespeare":
        text = (folder / "test.txt").read_text(encoding="utf-8")
    else:
        columns = {"text": "{question}\n{answer}"} if name == "gsm8k" else {"text": "text"}
        examples = load_dialogues(str(folder / "test.parquet"), split="test", columns=columns)
        text = "\n".join(parse_row(row)["text"] for row in examples.inputs)
    # one document: bos and eos between short ones would cost this model, which has only seen stories, 0.2 nats
    score = LanguageEvaluator(trainer_of(backbone, eval_batch_size=64)).score(load_dialogues([text[:60_000]]))
    assert score.cross_entropy == pytest.approx(nats, rel=0.015)
    assert score.num_bytes / score.tokens == pytest.approx(bytes_a_token, rel=0.015)
    assert score.bits_per_byte == pytest.approx(bits, rel=0.015)
