"""Causal language models as backbones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from everlora.backbones import load_backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import ModelError, OptionError, UnsupportedError
from everlora.heads import LanguageHead
from everlora.lowrank import attach
from tests.export.language_builders import load_language_model, save_language_model, tokens_of

ROWS = [
    json.dumps({"instruction": instruction, "input": "", "output": output})
    for instruction, output in (("red green", "blue"), ("where is my lost parcel", "red card lost"), ("my", "card"))
]


@pytest.fixture(params=["llama", "tied", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> CausalLMBackbone:
    return load_language_model(save_language_model(request.param, tmp_path / "model"))


def batch_of(backbone: CausalLMBackbone, *, pack: bool = False) -> dict[str, torch.Tensor]:
    encoded = backbone.encode(ROWS)
    return backbone.collate(encoded, range(len(encoded)), pack=pack)


def test_it_is_frozen_and_says_what_it_is(backbone: CausalLMBackbone) -> None:
    assert backbone.modality == "language" and backbone.pooling == "none" and not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert (backbone.num_blocks, backbone.feature_dim, backbone.vocab_size) == (2, 32, 16)
    assert backbone.num_parameters == sum(parameter.numel() for parameter in backbone.model.parameters())
    expected = {"gpt2": ("query", "value")}.get(backbone.architecture, ("q_proj", "v_proj"))
    assert backbone.default_targets == expected
    assert len(attach(backbone.model, backbone.default_targets, 2)) == 4
    assert backbone.default_targets == expected  # also with the layers in place


def test_hidden_states_are_those_of_the_model_at_real_tokens(backbone: CausalLMBackbone) -> None:
    batch = batch_of(backbone)
    mask = backbone.token_mask(batch)
    assert mask is not None and not mask.all()
    with torch.no_grad():
        whole = backbone.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        for layers in ([2], [0, 2, 1], [2, 2]):
            found = backbone.hidden_states(batch, layers)
            assert len(found) == len(layers)
            for states, layer in zip(found, layers, strict=True):
                assert torch.equal(states[mask], whole.hidden_states[layer][mask])
        features = backbone.features(batch)
        assert torch.equal(features, backbone.hidden_states(batch, [2])[0])
        torch.testing.assert_close(LanguageHead(backbone.output_head).logits(features)[mask], whole.logits[mask])


def test_only_the_last_states_need_no_others(backbone: CausalLMBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    right = backbone.model.base_model.forward

    def listen(*args: Any, **options: Any) -> Any:
        asked.append(options["output_hidden_states"])
        return right(*args, **options)

    monkeypatch.setattr(backbone.model.base_model, "forward", listen)
    with torch.no_grad():
        backbone.hidden_states(batch_of(backbone), [2])
        backbone.hidden_states(batch_of(backbone), [2, 1])
    assert asked == [False, True]


def test_packed_rows_do_not_see_each_other(backbone: CausalLMBackbone) -> None:
    plain, packed = batch_of(backbone), batch_of(backbone, pack=True)
    assert len(packed["input_ids"]) == 1 < len(plain["input_ids"])
    with torch.no_grad():
        apart, together = backbone.features(plain), backbone.features(packed)
    for row, mask in enumerate(plain["attention_mask"].bool()):
        place = packed["segments"] == row + 1
        torch.testing.assert_close(together[place], apart[row][mask], rtol=1e-4, atol=1e-5)
    blind = {name: values for name, values in packed.items() if name != "segments"}
    with torch.no_grad():
        assert not torch.allclose(backbone.features(blind), together, atol=1e-3)  # the segments matter


def test_packed_rows_do_not_see_each_other_in_bfloat16(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "model"), dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16
    plain, packed = batch_of(backbone), batch_of(backbone, pack=True)
    with torch.no_grad():
        apart, together = backbone.features(plain), backbone.features(packed)
    assert apart.dtype == torch.float32
    for row, mask in enumerate(plain["attention_mask"].bool()):
        difference = (together[packed["segments"] == row + 1] - apart[row][mask]).abs().max()
        assert difference < 0.1 * apart.abs().max()


def test_padding_on_the_right_changes_nothing(backbone: CausalLMBackbone) -> None:
    tokens = tokens_of(backbone, rows=1, length=6)
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    mask = (torch.arange(9) < 6).long()[None]
    with torch.no_grad():
        short = backbone.features({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        long = backbone.features({"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(long[:, :6], short, rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    folder = save_language_model("llama", tmp_path / "model")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_language_model(folder)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_changes_its_scores_afterwards_is_refused(tmp_path: Path) -> None:
    config = transformers.CohereConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, logit_scale=0.1
    )
    save_language_model("llama", tmp_path / "model")
    with quiet_transformers():
        torch.manual_seed(0)
        transformers.CohereForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="CohereForCausalLM changes its scores after the output layer"):
        load_language_model(tmp_path / "model")


def test_broken_folders_and_options_are_refused(tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "model")
    with pytest.raises(OptionError, match="expected max_length of at most 64, the positions of the model, found 65"):
        load_language_model(folder, max_length=65)
    for wrong in ({"pooling": "mean"}, {"image_size": 8}, {"normalize": "unit"}):
        with pytest.raises(
            OptionError, match="a language model takes no image_size, pooling, feature_layers or normalize"
        ):
            load_language_model(folder, **wrong)
    with pytest.raises(OptionError, match="for language models"):
        load_backbone(folder, quantization="4bit")
    with pytest.raises(OptionError, match="unknown kind 'causal'"):
        load_backbone(folder, kind="causal")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "h.1.mlp" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"expected all weights of GPT2LMHeadModel .* 4 missing"):
        load_language_model(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="expected a model that transformers"):
        load_language_model(folder)


def test_the_longest_row_follows_model_tokenizer_and_option(tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "model")
    assert load_language_model(folder).max_length == 64
    assert load_language_model(folder, max_length=9).max_length == 9
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 20}))
    assert load_language_model(folder).max_length == 20
