"""Every known architecture from a local folder: targets, pooling, dtype, errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from everlora.backbones import feature_depth, load_backbone
from everlora.backbones.architectures import known_projections
from everlora.backbones.base import Backbone
from everlora.errors import ModelError, OptionError, TargetError, UnsupportedError
from everlora.lowrank import attach
from tests.tiny_models import CONFIGS, IMAGE_KINDS, TEXT_KINDS, save_tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
TEXTS = ["where is my parcel", "red", "lost card green blue red", "my my", "unheard words"]
TARGETS = {"distilbert": ("k_lin", "v_lin"), "mpnet": ("k", "v"), "t5": ("k", "v")}


def run(backbone: Backbone, rows: list[int]) -> torch.Tensor:
    encoded = backbone.encode(IMAGES if backbone.modality == "image" else TEXTS)
    with torch.no_grad():
        return backbone.features(backbone.collate(encoded, rows))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_architecture_loads_frozen_with_its_keys_and_values(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path))
    assert backbone.architecture == kind
    assert backbone.modality == ("image" if kind in IMAGE_KINDS else "text")
    words = kind in ("bert", "roberta", "albert", "gpt2")
    assert backbone.default_targets == TARGETS.get(kind, ("key", "value") if words else ("k_proj", "v_proj"))
    assert not backbone.training and not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_do_not_depend_on_the_rest_of_the_batch(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path))
    together = run(backbone, [0, 1, 2, 3, 4])
    assert together.shape == (5, backbone.feature_dim) and together.dtype == torch.float32
    for row in range(5):
        # Padding and batching change the order of float32 sums only.
        torch.testing.assert_close(run(backbone, [row])[0], together[row], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model", "bert", "t5"])
def test_features_are_float32_in_half_precision(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path)
    exact = run(load_backbone(folder), [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(load_backbone(folder), [0, 1])
    half = load_backbone(folder, dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    for rounded in (mixed, run(half, [0, 1])):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits


def test_pooling_matches_its_definition(tmp_path: Path) -> None:
    folder = save_tiny("vit", tmp_path)
    backbone = load_backbone(folder)
    pixels = backbone.collate(backbone.encode(IMAGES), [0, 1])["pixel_values"]
    with torch.no_grad():
        hidden = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)(pixels).last_hidden_state
    expected = {
        "auto": hidden[:, 0],
        "cls": hidden[:, 0],
        "mean": hidden[:, 1:].mean(1),
        "cls_mean": torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1),
    }
    for pooling, features in expected.items():
        backbone = load_backbone(folder, pooling=pooling)
        assert backbone.feature_dim == features.shape[1]
        torch.testing.assert_close(run(backbone, [0, 1]), features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_features_of_several_layers_stand_side_by_side(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path)
    one, two = (load_backbone(folder, pooling="cls_mean", feature_layers=count) for count in (1, 2))
    assert two.feature_dim == 2 * one.feature_dim
    assert one.inputs_fingerprint != two.inputs_fingerprint
    assert (feature_depth(folder), feature_depth(folder, "pooler")) == (2, 1)
    features = run(two, [0, 1])
    torch.testing.assert_close(features[:, one.feature_dim :], run(one, [0, 1]))
    below = []
    inner = two.model.encoder.layer if kind == "bert" else two.model.layers
    hook = inner[-2].register_forward_hook(lambda _m, _i, out: below.append(out[0] if isinstance(out, tuple) else out))
    run(two, [0])
    hook.remove()
    torch.testing.assert_close(features[:1, :16], below[0][:1, 0])


def test_mean_pooling_of_registers_and_distillation_tokens_counts_patches_only(tmp_path: Path) -> None:
    for kind, prefix in (("dinov2_with_registers", 4), ("deit", 2)):
        backbone = load_backbone(save_tiny(kind, tmp_path / kind), pooling="mean")
        batch = backbone.collate(backbone.encode(IMAGES), [0])
        with torch.no_grad():
            hidden = backbone.model(**batch).last_hidden_state
        assert hidden.shape[1] == prefix + 4
        torch.testing.assert_close(run(backbone, [0]), hidden[:, prefix:].mean(1))


def test_clip_uses_its_own_normed_class_token(tmp_path: Path) -> None:
    folder = save_tiny("clip_vision_model", tmp_path)
    backbone = load_backbone(folder)
    batch = backbone.collate(backbone.encode(IMAGES), [0, 1])
    with torch.no_grad():
        expected = transformers.CLIPVisionModel.from_pretrained(folder)(**batch).pooler_output
    torch.testing.assert_close(run(backbone, [0, 1]), expected)


def test_a_sentence_encoder_says_how_it_pools_and_how_long_it_reads(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    backbone = load_backbone(folder)
    assert (backbone.pooling, backbone.max_length) == ("cls", 7)
    assert load_backbone(folder, pooling="mean", max_length=12).max_length == 12


def test_the_bert_pooler_is_loaded_only_when_used(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    assert load_backbone(folder).model.pooler is None
    backbone = load_backbone(folder, pooling="pooler")
    assert run(backbone, [0]).abs().max() <= 1.0  # it ends in a tanh


def test_an_untrained_pooler_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    assert load_backbone(folder).pooling == "mean"
    with pytest.raises(ModelError, match=r"2 missing, first pooler\.dense\.bias"):
        load_backbone(folder, pooling="pooler")


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.attention.self.key.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing, first encoder\.layer\.1\.attention\.self\.key\.weight"):
        load_backbone(folder)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_another_image_size_interpolates_positions(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path), image_size=24)
    assert backbone.image_size == 24
    batch = backbone.collate(backbone.encode(IMAGES), [0, 1])
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    with torch.no_grad():
        assert backbone.features(batch).isfinite().all()


def test_loading_is_silent_and_leaves_global_state_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder = save_tiny("bert", tmp_path)
    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_backbone(folder)
    assert torch.equal(torch.rand(4), expected)
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_unknown_layer_names_are_listed(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("bert", tmp_path))
    for name, module in list(backbone.model.named_modules()):
        if name.endswith("attention.self"):
            module.keys_of_mine, module.key = module.key, torch.nn.Identity()
    with pytest.raises(TargetError, match="found dense, keys_of_mine, query, value"):
        _ = backbone.default_targets


@pytest.mark.parametrize("kind", CONFIGS)
def test_projections_are_found_by_their_part_in_the_attention(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path))
    key, value = backbone.default_targets
    query = {"k_proj": "q_proj", "key": "query", "k_lin": "q_lin", "k": "q"}[key]
    assert backbone.attention_targets("query", "value") == (query, value)
    assert backbone.attention_targets("value", "key", "query") == (value, key, query)
    attached = attach(backbone.model, backbone.attention_targets("query", "value"), rank=1)
    assert len(attached) >= 2 and backbone.attention_targets("query") == (query,), "found again once adapted"
    with pytest.raises(OptionError, match="did you mean 'query'"):
        backbone.attention_targets("querry")


def test_projections_of_decoders_and_fused_ones() -> None:
    names = [f"layers.0.self_attn.{part}_proj" for part in "qkvo"] + ["layers.0.mlp.up_proj"]
    assert known_projections(names, ("query", "value")) == ("q_proj", "v_proj")
    mixed = ["a.q", "a.k", "a.v", "b.query", "b.key", "b.value"]
    assert known_projections(mixed, ("query",), ("k", "v")) == ("q",)
    with pytest.raises(TargetError, match=r"found the fused layer Wqkv.*targets=Wqkv"):
        known_projections(["layers.0.attn.Wqkv", "layers.0.attn.Wo"], ("query", "value"))
    with pytest.raises(TargetError, match="query and value projections, found dense"):
        known_projections(["encoder.dense"], ("query", "value"))


def test_an_unlisted_architecture_falls_back_to_known_layer_names(tmp_path: Path) -> None:
    config = transformers.SplinterConfig(
        vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    save_tiny("bert", tmp_path)
    transformers.SplinterModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert (backbone.architecture, backbone.pooling, backbone.default_targets) == ("splinter", "mean", ("key", "value"))
    assert run(backbone, [0]).shape == (1, 16)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    image, text = save_tiny("vit", tmp_path / "image"), save_tiny("bert", tmp_path / "text")
    stages = transformers.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
    swin = tmp_path / "swin"
    transformers.SwinModel(stages).save_pretrained(swin)
    for folder, options, message in (
        (image, {"pooling": "men"}, "unknown pooling 'men'; did you mean 'mean'"),
        (image, {"normalize": "imagenet"}, "unknown normalize"),
        (image, {"dtype": "float16"}, "unknown dtype 'float16'"),
        (image, {"max_length": 5}, "no max_length for the image model"),
        (image, {"image_size": 0}, "image_size as a positive whole number"),
        (text, {"image_size": 32}, "no image_size for the text model"),
        (text, {"max_length": 2}, "above 2, the special tokens"),
        (text, {"max_length": 25}, "at most 24, the positions of the model, found 25"),
        (text, {"feature_layers": 3}, "feature_layers of at most 2 for .*, found 3: pooling .mean. of its 2 layers"),
        (text, {"feature_layers": 2, "pooling": "pooler"}, "pooling 'pooler' of its 1 layer gives no more"),
        (swin, {"feature_layers": 2}, "at most 1 for"),
    ):
        with pytest.raises(OptionError, match=message):
            load_backbone(folder, **options)
    with pytest.raises(UnsupportedError, match="is not run"):
        load_backbone(image, trust_remote_code=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    (folder / name).write_text("not what it should be")
    (folder / "vocab.txt").unlink()
    with pytest.raises(ModelError) as caught:
        load_backbone(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and message.endswith("name another model")


def test_no_preprocessor_means_pixels_from_minus_one_to_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny("vit", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.INFO, "everlora"):
        backbone = load_backbone(folder)
    assert "scaled to [-1, 1]" in caplog.text
    white = backbone.collate(backbone.encode(np.full((1, 16, 16, 3), 255, np.uint8)), [0])["pixel_values"]
    assert white.min() == white.max() == 1.0


def test_remote_code_named_by_a_config_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_my_own", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError):
        load_backbone(folder)


@pytest.mark.parametrize("kind", ["vit", *TEXT_KINDS[:1]])
def test_gradients_reach_layers_that_are_trained(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path))
    weights = [p for name, p in backbone.named_parameters() if name.endswith((".v_proj.weight", ".value.weight"))]
    for weight in weights:
        weight.requires_grad_(True)
    encoded = backbone.encode(IMAGES if kind == "vit" else TEXTS)
    backbone.features(backbone.collate(encoded, [0, 1])).square().sum().backward()
    assert len(weights) == 2 and all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)
