"""`LanguageEvaluator`: predictions in order, scores of answers, forms of prompts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.errors import DataError
from everlora.language import LanguageEvaluator, rouge_l
from everlora.streams import parse_row
from tests.backbones.language_builders import EOS
from tests.language.builders import prompt_of, rows, trainer_of
from tests.language.test_generation import TEXTS, by_hand

LABELS = ["good", "bad", "x"]


def evaluator_of(backbone: CausalLMBackbone, **options: object) -> LanguageEvaluator:
    return LanguageEvaluator(trainer_of(backbone), **{"max_new_tokens": 6, **options})  # type: ignore[arg-type]


def written(backbone: CausalLMBackbone, text: str) -> tuple[str, float]:
    tokens, total = by_hand(backbone, prompt_of(text), 6, {EOS})
    return backbone.inputs.decode(tokens), total


def test_predictions_come_in_the_order_of_the_rows(backbone: CausalLMBackbone) -> None:
    asked = [
        {"instruction": text, "label_set": LABELS} if n % 2 else {"instruction": text} for n, text in enumerate(TEXTS)
    ]
    found = evaluator_of(backbone).predict(rows(*asked, require_answers=False))
    assert len(found) == len(TEXTS)
    for number, (text, prediction) in enumerate(zip(TEXTS, found, strict=True)):
        alone = evaluator_of(backbone).predict(rows(asked[number], require_answers=False))[0]
        assert (alone.label, alone.text) == (prediction.label, prediction.text)
        if number % 2:
            assert prediction.text is None
            assert set(prediction.scores) == set(LABELS)
            assert prediction.label == next(iter(prediction.scores))
            assert prediction.score == max(prediction.scores.values())
        else:
            expected, total = written(backbone, text)
            assert (prediction.label, prediction.text, dict(prediction.scores)) == ("", expected, {})
            assert prediction.score == pytest.approx(math.exp(total), rel=1e-3)


def test_scores_of_answers(backbone: CausalLMBackbone) -> None:
    evaluator = evaluator_of(backbone)
    texts = [written(backbone, text)[0] for text in TEXTS[:3]]
    wrong = texts[1] + " and more words"
    tasks = [
        {"instruction": TEXTS[0], "output": texts[0].upper()},
        {"instruction": TEXTS[1], "output": wrong},
        {"messages": [{"role": "user", "content": TEXTS[2]}, {"role": "assistant", "content": texts[2]}]},
    ]
    examples = rows(*tasks[:2])
    best = [
        prediction.label
        for prediction in evaluator.predict(rows({"instruction": "q", "label_set": LABELS}, require_answers=False))
    ]
    labelled = rows(*({"instruction": "q", "output": label, "label_set": LABELS} for label in LABELS))
    plain = evaluator.score(examples)
    assert (plain.correct, plain.answers, plain.rouge_l, plain.accuracy) == (None, 0, None, None)
    full = evaluator.score(examples, answers=True)
    assert (full.nll, full.tokens, full.num_bytes, full.rows) == (plain.nll, plain.tokens, plain.num_bytes, plain.rows)
    assert (full.correct, full.answers) == (1, 2)
    pairs = [(texts[0], texts[0].upper()), (texts[1], wrong)]
    assert full.rouge_l == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    assert evaluator.score(rows(tasks[2]), answers=True).correct == 1
    choice = evaluator.score(labelled, answers=True)
    assert (choice.correct, choice.answers, choice.rouge_l) == (1, 3, None)
    assert best[0] in LABELS
    assert evaluator.score(rows({"text": "plain text"}), answers=True).accuracy is None


def test_an_answer_must_be_among_its_labels(backbone: CausalLMBackbone) -> None:
    with pytest.raises(DataError, match="'label_set'"):
        evaluator_of(backbone).score(rows({"instruction": "q", "output": "ugly", "label_set": LABELS}), answers=True)
    near = rows({"instruction": "q", "output": " Good ", "label_set": ["good"]})
    assert evaluator_of(backbone).score(near, answers=True).correct == 1


def test_forms_of_prompts(backbone: CausalLMBackbone) -> None:
    row = json.dumps({"instruction": TEXTS[0], "input": ""})
    forms = [
        TEXTS[0],
        row,
        {"instruction": TEXTS[0]},
        {"prompt": TEXTS[0], "answer": "ignored"},
        {"text": TEXTS[0] + "\n"},
    ]
    forms.append({"messages": [{"role": "user", "content": TEXTS[0]}]})
    found = evaluator_of(backbone).generate(forms)
    assert found == [written(backbone, TEXTS[0])[0]] * len(forms)
    assert evaluator_of(backbone).generate(['{"not": "a row"}']) == [written(backbone, '{"not": "a row"}')[0]]
    assert evaluator_of(backbone).generate(forms[:1], 2) == [found[0][:2]]


def test_options_reach_the_labels(backbone: CausalLMBackbone) -> None:
    asked = rows({"instruction": "q", "label_set": ["a", "much longer"]}, require_answers=False)
    scores = [
        evaluator_of(backbone, **options).predict(asked)[0].scores["a"]
        for options in ({}, {"length_norm": True}, {"pmi": True})
    ]
    assert len({round(score, 6) for score in scores}) == 3


def test_predict_looks_at_no_answer(backbone: CausalLMBackbone) -> None:
    with_answer = rows({"instruction": "q", "output": "secret"})
    without = rows({"instruction": "q"}, require_answers=False)
    assert "output" in parse_row(with_answer.inputs[0])
    evaluator = evaluator_of(backbone)
    assert evaluator.predict(with_answer) == evaluator.predict(without)
