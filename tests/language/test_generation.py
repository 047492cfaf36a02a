"""Greedy generation: against a loop without cache and padding, with adapters, and whatever the folder's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.errors import DataError, OptionError
from everlora.language import LanguageEvaluator, write
from everlora.language.generation import USUAL_NEW_TOKENS, check_max_new_tokens
from everlora.lowrank import attach, share_down
from everlora.settings import LearnerOptions
from tests.backbones.language_builders import BOS, EOS
from tests.language.builders import adapt, load, prompt_of, rows, save_model, trainer_of

TEXTS = ["one two three four", "a", "somewhat longer than the others are", "b c", "x y z"]


def by_hand(backbone: CausalLMBackbone, prompt: list[int], steps: int, ends: set[int]) -> tuple[list[int], float]:
    """Take the likeliest token again and again, by whole passes."""
    ids, total = list(prompt), 0.0
    for _ in range(steps):
        with torch.no_grad():
            chances = backbone.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        token = int(chances.argmax())
        total += float(chances[token])
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :], total


def prompts_of(backbone: CausalLMBackbone) -> list[list[int]]:
    return [prompt_of(text) for text in TEXTS]


@pytest.mark.parametrize(("kind", "adapted"), [("llama", False), ("llama", True), ("mistral", False), ("gpt2", False)])
def test_batches_write_what_single_rows_write(kind: str, adapted: bool, tmp_path: Path) -> None:
    backbone = load(save_model(tmp_path, kind))
    before = [by_hand(backbone, prompt, 12, {EOS})[0] for prompt in prompts_of(backbone)]
    if adapted:
        adapt(backbone)
    wanted = [by_hand(backbone, prompt, 12, {EOS}) for prompt in prompts_of(backbone)]
    assert ([tokens for tokens, _ in wanted] != before) == adapted
    for size in (1, 2, 8):
        found = write(backbone, prompts_of(backbone), max_new_tokens=12, batch_size=size)
        assert [list(row.tokens) for row in found] == [tokens for tokens, _ in wanted]
        assert [row.log_probability for row in found] == pytest.approx([total for _, total in wanted], abs=1e-3)
        assert [row.text for row in found] == [backbone.inputs.decode(tokens) for tokens, _ in wanted]


def test_layers_that_share_their_first_product(backbone: CausalLMBackbone) -> None:
    layers = attach(backbone.model, ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"), 2)
    share_down(list(layers.values()))
    with torch.no_grad():
        for layer in layers.values():
            layer.up.normal_()
    found = write(backbone, prompts_of(backbone), max_new_tokens=8)
    wanted = [by_hand(backbone, prompt, 8, {EOS})[0] for prompt in prompts_of(backbone)]
    assert [list(row.tokens) for row in found] == wanted


def test_the_folders_sampling_defaults_have_no_say(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0}
    own |= {"suppress_tokens": list(range(100, 200)), "no_repeat_ngram_size": 1, "num_beams": 2, "max_length": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    tuned, plain = load(tmp_path), load(folder)
    assert tuned.model.generation_config.repetition_penalty == 9.0
    wanted = write(plain, prompts_of(plain), max_new_tokens=10)
    assert write(tuned, prompts_of(tuned), max_new_tokens=10) == wanted
    assert tuned.model.generation_config.repetition_penalty == 9.0  # as it was


def test_writing_stops_at_the_end_tokens_of_model_and_tokenizer(backbone: CausalLMBackbone) -> None:
    free = [by_hand(backbone, prompt, 12, set())[0] for prompt in prompts_of(backbone)]
    stop, other = free[0][4], free[2][2]
    backbone.inputs.eos = other
    for named in (stop, [stop, 7]):
        backbone.model.generation_config.eos_token_id = named
        ends = {stop, other, 7} if isinstance(named, list) else {stop, other}
        wanted = [by_hand(backbone, prompt, 12, ends) for prompt in prompts_of(backbone)]
        found = write(backbone, prompts_of(backbone), max_new_tokens=12)
        assert [list(row.tokens) for row in found] == [tokens for tokens, _ in wanted]
        assert [row.log_probability for row in found] == pytest.approx([total for _, total in wanted], abs=1e-3)
    assert len({len(row.tokens) for row in found}) > 1


def test_modes_and_random_numbers_stay(backbone: CausalLMBackbone) -> None:
    backbone.train()
    state = torch.get_rng_state()
    first = write(backbone, prompts_of(backbone), max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in backbone.model.modules())
    assert write(backbone, prompts_of(backbone), max_new_tokens=5) == first


def test_lengths_and_empty_prompts_are_checked(backbone: CausalLMBackbone) -> None:
    evaluator = LanguageEvaluator(trainer_of(backbone))
    for number in (0, 95, 2.5, True):
        with pytest.raises(OptionError, match="max_new_tokens"):
            evaluator.generate(["x"], number)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="max_length=96, found 95"):
        LanguageEvaluator(trainer_of(backbone), max_new_tokens=95).generate(["x"])
    with pytest.raises(DataError, match="no tokens"):
        write(backbone, [[BOS], []], max_new_tokens=2)
    assert evaluator.generate([]) == []
    assert write(backbone, [], max_new_tokens=2) == []


@pytest.mark.parametrize(("max_length", "most"), [(24, 12), (64, 32), (66, 64), (96, 64)])
def test_the_usual_length_leaves_room_for_a_prompt(folder: Path, max_length: int, most: int) -> None:
    short = load(folder, max_length=max_length)
    assert check_max_new_tokens(short, USUAL_NEW_TOKENS) == most
    if most < USUAL_NEW_TOKENS:  # another number was somebody's wish, and is not changed behind their back
        with pytest.raises(OptionError, match=f"between 1 and {max_length - 2}, .* found {USUAL_NEW_TOKENS - 1}"):
            check_max_new_tokens(short, USUAL_NEW_TOKENS - 1)


def test_a_model_of_short_rows_answers_without_further_options(folder: Path) -> None:
    evaluator = LanguageEvaluator(trainer_of(load(folder, max_length=24)))
    answers = evaluator.predict(rows({"instruction": "what is it", "output": ""}, require_answers=False))
    assert len(answers) == 1 and answers[0].text is not None


def test_the_usual_length_is_that_of_a_learner() -> None:
    assert LearnerOptions().max_new_tokens == USUAL_NEW_TOKENS
