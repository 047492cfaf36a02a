"""Label likelihood: against whole passes without a cache, ties, and its options."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.errors import DataError
from everlora.language import LabelScores, label_scores
from everlora.streams import parse_row
from tests.backbones.language_builders import EOS, word_tokenizer
from tests.language.builders import adapt, load, prompt_of, rows, save_model, tokens_of, trainer_of

SETS = [
    ("how is the weather today", ["good", "bad", "it rains", "a"]),
    ("hi", ["yes", "no"]),
    ("is this one short", ["it", "sport news", "x", "business", "world"]),
    ("and", ["one"]),
    ("the last of the five questions", ["b", "c"]),
]


def directly(backbone: CausalLMBackbone, prompt: list[int], label: list[int]) -> float:
    """Log-probability of a label after a prompt: one pass over both, no padding, no cache."""
    ids = torch.tensor([[*prompt, *label]])
    with torch.no_grad():
        chances = backbone.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(chances[len(prompt) + place - 1, token]) for place, token in enumerate(label))


def asked(*sets: tuple[str, list[str]]) -> list[dict[str, object]]:
    examples = rows(*({"instruction": text, "label_set": labels} for text, labels in sets), require_answers=False)
    return [parse_row(text) for text in examples.inputs]


@pytest.mark.parametrize(("kind", "adapted"), [("llama", False), ("llama", True), ("mistral", False), ("gpt2", False)])
def test_the_shared_prefix_gives_what_whole_passes_give(kind: str, adapted: bool, tmp_path: Path) -> None:
    backbone = load(save_model(tmp_path, kind))
    if adapted:
        adapt(backbone)
    for size in (1, 2, 16):
        found = label_scores(trainer_of(backbone, eval_batch_size=size), asked(*SETS))
        for (text, labels), scores in zip(SETS, found, strict=True):
            wanted = [directly(backbone, prompt_of(text), tokens_of(label)) for label in labels]
            assert scores.labels == tuple(labels)
            np.testing.assert_allclose(scores.scores, wanted, atol=1e-4)
            assert scores.best == labels[int(np.argmax(wanted))]


def test_length_norm_and_pmi(backbone: CausalLMBackbone) -> None:
    text, labels = SETS[2]
    lengths = np.array([len(label) for label in labels])
    plain = np.array([directly(backbone, prompt_of(text), tokens_of(label)) for label in labels])
    prior = np.array([directly(backbone, prompt_of(""), tokens_of(label)) for label in labels])
    trainer = trainer_of(backbone)
    asking = asked(*SETS)
    np.testing.assert_allclose(label_scores(trainer, asking, length_norm=True)[2].scores, plain / lengths, atol=1e-4)
    np.testing.assert_allclose(label_scores(trainer, asking, pmi=True)[2].scores, plain - prior, atol=1e-4)
    both = label_scores(trainer, asking, pmi=True, length_norm=True)[2].scores
    np.testing.assert_allclose(both, (plain - prior) / lengths, atol=1e-4)


def test_a_label_that_begins_another_is_told_from_it_by_its_end(backbone: CausalLMBackbone) -> None:
    labels = ["1", "10", "2"]
    scores = label_scores(trainer_of(backbone), asked(("count", labels), ("count", ["1", "2"])))
    prompt = prompt_of("count")
    wanted = [directly(backbone, prompt, [*tokens_of(label), EOS]) for label in labels]
    np.testing.assert_allclose(scores[0].scores, wanted, atol=1e-4)
    np.testing.assert_allclose(
        scores[1].scores, [directly(backbone, prompt, tokens_of(label)) for label in ("1", "2")], atol=1e-4
    )


def test_ties_go_to_the_first(tmp_path: Path) -> None:
    words = ["[UNK]", "what", "known", "answer", *(f"word{n}" for n in range(20))]
    tokenizer = word_tokenizer(*words)
    backbone = load(save_model(tmp_path, tokenizer=tokenizer))
    labels = ["mystery", "known", "riddle", "secret"]  # three of them are the same unknown token
    for order in permutations(labels):
        scores = label_scores(trainer_of(backbone), asked(("what", list(order)), ("what answer", list(order))))
        for row in scores:
            values = dict(zip(row.labels, row.scores.tolist(), strict=True))
            assert values["mystery"] == values["riddle"] == values["secret"] != values["known"]
            unknown = [label for label in order if label != "known"]
            ranked = unknown[:1] if values["mystery"] > values["known"] else ["known"]
            assert row.best == ranked[0] == next(iter(row.probabilities))
            assert [label for label in row.probabilities if label != "known"] == unknown


def test_probabilities_are_the_softmax_best_first() -> None:
    scores = LabelScores(("a", "b", "c", "d"), np.log([0.1, 0.4, 0.4, 0.1]) - 700.0)
    assert scores.best == "b"
    assert list(scores.probabilities) == ["b", "c", "a", "d"]
    assert list(scores.probabilities.values()) == pytest.approx([0.4, 0.4, 0.1, 0.1])


def test_a_label_named_twice_counts_once(backbone: CausalLMBackbone) -> None:
    scores = label_scores(trainer_of(backbone), asked(("x", ["a", "b", "a"])))[0]
    assert scores.labels == ("a", "b")
    assert sum(scores.probabilities.values()) == pytest.approx(1.0)


def test_long_prompts_lose_their_beginning_and_keep_room_for_labels(folder: Path) -> None:
    backbone = load(folder, max_length=16)
    scores = label_scores(trainer_of(backbone), asked(("0123456789abcdefghij", ["yes!", "no"])))[0]
    prompt = prompt_of("abcdefghij")  # 16 = bos + 11 + the 4 tokens of the longest label
    wanted = [directly(backbone, prompt, tokens_of(label)) for label in ("yes!", "no")]
    np.testing.assert_allclose(scores.scores, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"), [([], "empty 'label_set'"), ([""], "0 tokens"), (["a" * 95, "b"], "95 tokens")]
)
def test_unusable_labels_are_refused(backbone: CausalLMBackbone, labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_scores(trainer_of(backbone), [{"instruction": "x", "input": "", "label_set": labels}])
