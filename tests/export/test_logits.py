"""Exports load with plain transformers and plain peft, and give the learner's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.backbones.base import Backbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import OptionError
from everlora.export import export_merged, export_peft
from tests.export.builders import (
    CARD,
    IMAGES,
    LABELS,
    TEXTS,
    learner_logits,
    make_head,
    raw_rows,
    readme_code,
    teach,
)
from tests.tiny_models import save_processor, save_tiny


def readme_logits(folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with quiet_transformers():
        exec(compile(readme_code(folder)[0], "README.md", "exec"), names)
    assert tuple(names["classes"]) == tuple(dict.fromkeys(LABELS))
    return names["score"](raw_rows(backbone))


OWN_CLASS = {
    ("vit", "auto"): "ViTForImageClassification",
    ("deit", "auto"): "DeiTForImageClassification",
    ("dinov2", "auto"): "Dinov2ForImageClassification",
    ("dinov2", "mean"): "Dinov2ForImageClassification",
    ("dinov2_with_registers", "cls_mean"): "Dinov2WithRegistersForImageClassification",
    ("beit", "auto"): "BeitForImageClassification",
    ("bert", "pooler"): "BertForSequenceClassification",
    ("albert", "pooler"): "AlbertForSequenceClassification",
}
BESIDE = [
    ("vit", "mean"),
    ("clip_vision_model", "auto"),
    ("siglip_vision_model", "auto"),
    ("bert", "auto"),
    ("roberta", "auto"),
    ("distilbert", "cls"),
    ("mpnet", "auto"),
    ("t5", "auto"),
    ("gpt2", "auto"),
]


@pytest.mark.parametrize(("kind", "pooling"), [*OWN_CLASS, *BESIDE])
def test_merged_readme_gives_the_learners_logits(
    kind: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"), pooling=pooling)
    plain = learner_logits(backbone, make_head(backbone))
    layers, head = teach(backbone), make_head(backbone)
    expected = learner_logits(backbone, head)
    assert (expected - plain).abs().max() > 0.01  # the adapters matter
    report = export_merged(backbone, layers, head, tmp_path / "out", card=CARD)
    assert report.has_classifier == ((kind, pooling) in OWN_CLASS)
    assert report.model_class == OWN_CLASS.get((kind, pooling), type(backbone.model).__name__)
    assert report.max_difference < 1e-5
    found = readme_logits(tmp_path / "out", backbone, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out.strip()  # the example at its end says a class


@pytest.mark.parametrize(("kind", "pooling"), [("vit", "cls"), ("dinov2", "cls_mean"), ("bert", "mean")])
def test_readmes_of_several_layers_give_the_learners_logits(
    kind: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"), pooling=pooling, feature_layers=2)
    layers, head = teach(backbone), make_head(backbone)
    expected = learner_logits(backbone, head)
    for name, export in (("merged", export_merged), ("peft", export_peft)):
        report = export(backbone, layers, head, tmp_path / name, card=CARD)
        assert (report.has_classifier, report.max_difference < 1e-5) == (False, True)
        found = readme_logits(tmp_path / name, backbone, monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, _ in BESIDE] + ["dinov2"])
def test_peft_readme_gives_the_learners_logits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    report = export_peft(backbone, layers, head, tmp_path / "out", card=CARD)
    assert (report.has_classifier, report.max_difference < 1e-5) == (False, True)
    found = readme_logits(tmp_path / "out", backbone, monkeypatch)
    torch.testing.assert_close(found, learner_logits(backbone, head), rtol=1e-5, atol=1e-5)


def test_slices_of_a_fused_layer_become_one_lora_of_it(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("gpt2", tmp_path / "base"))
    base = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    layers, head = teach(backbone), make_head(backbone)
    assert {name.rsplit(".", 2)[1:] == ["c_attn", "query"] for name in layers} == {False}, "keys and values"
    export_merged(backbone, layers, head, tmp_path / "merged", card=CARD)
    export_peft(backbone, layers, head, tmp_path / "peft", card=CARD)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert merged.keys() == base.keys() and len(factors) == 4
    for name in ("h.0.attn.c_attn", "h.1.attn.c_attn"):
        weight, old = merged[f"{name}.weight"], base[f"{name}.weight"]
        assert torch.equal(weight[:, :16], old[:, :16]) and not torch.equal(weight[:, 16:], old[:, 16:])
        down, up = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert down.shape[0] == sum(layers[f"{name}.{part}"].total_rank + 1 for part in ("key", "value"))
        torch.testing.assert_close((up @ down).T, weight - old)
        assert not bool(up[:16].any())
    small = export_peft(backbone, layers, head, tmp_path / "small", card=CARD, max_rank=2)
    assert small.truncation.keys() == {"h.0.attn.c_attn", "h.1.attn.c_attn"}
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["fan_in_fan_out"]) == (2, True)


def test_a_truncated_adapter_states_its_error(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    report = export_peft(backbone, layers, head, tmp_path / "out", card=CARD, max_rank=2)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.truncation.keys() == layers.keys()
    for name, layer in layers.items():
        prefix = f"base_model.model.{name}.lora_"
        written = factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
        whole = layer.effective_weight().detach() - layer.base.weight
        assert written.shape == whole.shape and len(factors[f"{prefix}A.weight"]) == 2
        assert float((written - whole).norm() / whole.norm()) == pytest.approx(report.truncation[name], rel=1e-4)
    assert max(report.truncation.values()) > 0.01 and report.max_difference > 1e-3
    assert json.loads((tmp_path / "out" / "export.json").read_text())["truncation"] == report.truncation
    assert "cut to a lower rank" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    whole = export_peft(backbone, layers, head, tmp_path / "whole", card=CARD, max_rank=5)
    assert whole.truncation == {} and whole.max_difference < 1e-5
    with pytest.raises(OptionError, match="rank must be a positive integer"):
        export_peft(backbone, layers, head, tmp_path / "none", card=CARD, max_rank=0)


def test_plain_peft_gives_the_features(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers, head = teach(backbone, current=False), make_head(backbone)
    export_peft(backbone, layers, head, tmp_path / "out", card=CARD)
    config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias, config.lora_dropout) == (
        4,
        4,
        False,
        "none",
        0.0,
    )
    with quiet_transformers():
        base = transformers.AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        automatic = peft.AutoPeftModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    batch = backbone.collate(backbone.encode(IMAGES), np.arange(5))
    with torch.no_grad():
        expected = backbone.features(batch)
        for loaded in (model, automatic):
            found = loaded(**batch).last_hidden_state[:, 0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted({tuple(t.shape) for name, t in factors.items() if "lora_A" in name}) == [(3, 16), (4, 16)]


def test_pipeline_gives_the_learners_probabilities(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    export_merged(backbone, layers, head, tmp_path / "out", card=CARD)
    expected = learner_logits(backbone, head).softmax(dim=1)
    with quiet_transformers():
        classify = transformers.pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
        answers = classify(raw_rows(backbone), top_k=3)
    for row, answer in zip(expected, answers, strict=True):
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores[label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-5)


def test_text_pipeline_gives_the_learners_probabilities(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("bert", tmp_path / "base"), pooling="pooler", max_length=5)
    layers, head = teach(backbone), make_head(backbone)
    export_merged(backbone, layers, head, tmp_path / "out", card=CARD)
    names: dict[str, Any] = {"folder": str(tmp_path / "out"), "texts": TEXTS}
    with quiet_transformers():
        exec(readme_code(tmp_path / "out")[1], names)
        answers = names["classify"](TEXTS, top_k=None)
    for row, answer in zip(learner_logits(backbone, head).softmax(dim=1), answers, strict=True):
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores[label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize("write", [export_merged, export_peft])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_class_scores_the_best_of_its_rows(
    write: Any, normalize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers = teach(backbone)
    head = make_head(backbone, (LABELS[0], LABELS[1], LABELS[0], LABELS[2], LABELS[1]), normalize=normalize)
    features = backbone.features(backbone.collate(backbone.encode(IMAGES), np.arange(5)))
    if normalize:
        features = features / features.norm(dim=1, keepdim=True)
    rows = features @ torch.from_numpy(head.weight).T + torch.from_numpy(head.bias)
    expected = torch.stack([rows[:, [0, 2]].amax(1), rows[:, [1, 4]].amax(1), rows[:, 3]], dim=1)
    torch.testing.assert_close(
        head.logits(backbone.features(backbone.collate(backbone.encode(IMAGES), np.arange(5)))), expected
    )
    report = write(backbone, layers, head, tmp_path / "out", card=CARD)
    assert not report.has_classifier
    found = readme_logits(tmp_path / "out", backbone, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"image_size": 24}, {"normalize": "unit"}], ids=["size", "unit"])
def test_options_of_the_images_travel_along(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("vit", tmp_path / "base")
    save_processor(folder, size={"shortest_edge": 20}, crop_size=16, image_processor_type="CLIPImageProcessor")
    backbone = load_backbone(folder, **options)
    layers, head = teach(backbone), make_head(backbone)
    expected = learner_logits(backbone, head)
    for write, name in ((export_merged, "merged"), (export_peft, "peft")):
        write(backbone, layers, head, tmp_path / name, card=CARD)
        found = readme_logits(tmp_path / name, backbone, monkeypatch)
        # Resizing by Pillow and by torch may differ by one grey level of a pixel.
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("write", [export_merged, export_peft])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_bfloat16_bases_keep_their_dtype(
    write: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"), dtype="bfloat16")
    layers, head = teach(backbone), make_head(backbone)
    report = write(backbone, layers, head, tmp_path / "out", card=CARD)
    assert not report.has_classifier  # the head stays in float32
    expected = learner_logits(backbone, head)
    found = readme_logits(tmp_path / "out", backbone, monkeypatch)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    if write is export_merged:
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
