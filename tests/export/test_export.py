"""Exports load with plain transformers and plain peft, and give the learner's logits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.backbones.base import Backbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import ModelError, NumericError, ShapeError, StoreError, UnsupportedError
from everlora.export import ExportHead, export_merged, export_peft
from everlora.export import write as write_module
from everlora.lowrank import LowRankLinear, attach
from tests.tiny_models import IMAGE_KINDS, save_processor, save_tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
TEXTS = ["where is my parcel", "red", "lost card green blue red", "my my", "unheard words"]
CARD = {
    "method": "inflora",
    "scenario": "class_incremental",
    "base_model": "owner/name",
    "base_sha256": "ab" * 32,
    "tasks": [{"name": "january | first", "labels": ["a"]}, {"name": "february", "labels": ["b", "c"]}],
}
# One class without a quirk, one with characters that code and Markdown could trip over.
LABELS = ("plain", 'quo"te\\ `tick` | ünï', "two\nlines")


def teach(backbone: Backbone, *, current: bool = True) -> dict[str, LowRankLinear]:
    """Attach two past blocks of unequal rank and scale, and a current one."""
    generator = torch.Generator().manual_seed(1)
    layers = attach(backbone.model, backbone.default_targets, rank=2, generator=generator)
    for number, layer in enumerate(layers.values()):
        for rank, scale in ((2, 1.0), (1 + number % 2, -0.5)):
            layer.start_block(rank, generator=generator)
            layer.up.data.normal_(std=0.5, generator=generator)
            layer.invalidate()
            layer.fold_block(scale)
        if current:
            layer.start_block(1, generator=generator)
            layer.up.data.normal_(std=0.5, generator=generator)
            layer.invalidate()
    return layers


def make_head(backbone: Backbone, labels: tuple[str, ...] = LABELS, **options: Any) -> ExportHead:
    generator = np.random.default_rng(2)
    weight = generator.normal(size=(len(labels), backbone.feature_dim)).astype(np.float32)
    return ExportHead(weight, generator.normal(size=len(labels)).astype(np.float32), labels, **options)


def rows_of(backbone: Backbone) -> Any:
    return IMAGES if backbone.modality == "image" else TEXTS


def learner_logits(backbone: Backbone, head: ExportHead) -> Tensor:
    encoded = backbone.encode(rows_of(backbone))
    with torch.no_grad():
        return head.logits(backbone.features(backbone.collate(encoded, np.arange(len(encoded)))))


def raw_rows(backbone: Backbone) -> list[Any]:
    return [Image.fromarray(row) for row in IMAGES] if backbone.modality == "image" else TEXTS


def readme_code(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


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


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip_vision_model", "bert", "roberta", "distilbert", "mpnet", "t5"])
def test_peft_readme_gives_the_learners_logits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    report = export_peft(backbone, layers, head, tmp_path / "out", card=CARD)
    assert (report.has_classifier, report.max_difference < 1e-5) == (False, True)
    found = readme_logits(tmp_path / "out", backbone, monkeypatch)
    torch.testing.assert_close(found, learner_logits(backbone, head), rtol=1e-5, atol=1e-5)


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


def test_export_without_adapters_is_the_base_and_its_head(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    head = make_head(backbone)
    assert export_merged(backbone, {}, head, tmp_path / "out", card={}).max_difference < 1e-5
    with pytest.raises(UnsupportedError, match="no layer has any; export merged"):
        export_peft(backbone, {}, head, tmp_path / "peft", card={})
    assert not (tmp_path / "peft").exists()


def test_the_learner_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("bert", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    export_merged(backbone, layers, head, tmp_path / "merged", card=CARD)
    assert torch.equal(torch.rand(3), expected)
    export_peft(backbone, layers, head, tmp_path / "peft", card=CARD)
    after = backbone.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert backbone.training and all(module.training for module in backbone.modules())
    assert all(layer is backbone.model.get_submodule(name) for name, layer in layers.items())


@pytest.mark.slow
@pytest.mark.parametrize("write", [export_merged, export_peft])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_readme_runs_alone_without_warnings_or_everlora(write: Any, kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"))
    write(backbone, teach(backbone), make_head(backbone), tmp_path / "out", card=CARD)
    check = "import sys; assert not any(name.startswith('everlora') for name in sys.modules)"
    program = "\n".join([*readme_code(tmp_path / "out"), check])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path / "out",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert any(label.split("\n")[0] in done.stdout for label in LABELS)


def test_the_readme_is_a_card(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    export_merged(backbone, teach(backbone), make_head(backbone), tmp_path / "out", card=CARD)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    major = transformers.__version__.split(".")[0]
    for part in (
        "library_name: transformers",
        "inflora",
        "owner/name",
        "ab" * 32,
        f"transformers {major}",
        "everlora 0.",
    ):
        assert part in text
    assert "| 1 | january \\| first | 1 |" in text and "| 2 | february | 2 |" in text
    labels = re.search(r"```text\n(.*?)\n```", text, flags=re.DOTALL)
    assert labels is not None and [json.loads(line) for line in labels[1].split("\n")] == list(LABELS)
    info = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (info["kind"], info["model_class"], info["has_classifier"]) == ("merged", "ViTForImageClassification", True)
    assert 0 <= info["max_logit_difference"] < 1e-5


def test_labels_of_the_base_do_not_leak_into_the_export(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base", num_labels=9), pooling="mean")
    export_merged(backbone, {}, make_head(backbone), tmp_path / "out", card={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    head = make_head(backbone)
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    for target in (used, used / "mine.txt"):
        with pytest.raises(StoreError, match="expected a new or empty folder"):
            export_merged(backbone, {}, head, target, card={})
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_merged(backbone, {}, head, tmp_path / "empty", card={})
    export_merged(backbone, {}, head, tmp_path / "deep" / "er", card={})
    for folder in (tmp_path / "empty", tmp_path / "deep" / "er"):
        assert (folder / "model.safetensors").is_file()
        assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "deep", "empty", "used"]


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def test_an_export_with_other_logits_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    real = write_module.build_classifier

    def spoiled(*args: Any) -> Any:
        model = real(*args)
        model.classifier.bias.data += 0.1
        return model

    monkeypatch.setattr(write_module, "build_classifier", spoiled)
    with pytest.raises(ModelError, match=r"found a difference of 0\.1"):
        export_merged(backbone, layers, head, tmp_path / "out", card={})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    wide = ExportHead(np.zeros((2, 5), np.float32), np.zeros(2, np.float32), ("a", "b"))
    with pytest.raises(ShapeError, match="a head for 16 features, found one for 5"):
        export_merged(backbone, {}, wide, tmp_path / "out", card={})
    other = load_backbone(tmp_path / "base")
    with pytest.raises(ModelError, match="found it detached"):
        export_merged(backbone, teach(other), make_head(backbone), tmp_path / "out", card={})
    with pytest.raises(ShapeError, match="one weight row, one bias and one label"):
        ExportHead(np.zeros((2, 5), np.float32), np.zeros(2, np.float32), ("a",))
    with pytest.raises(NumericError, match="finite head weights"):
        ExportHead(np.full((1, 5), np.nan, np.float32), np.zeros(1, np.float32), ("a",))


def test_a_network_outside_transformers_is_declined(tmp_path: Path) -> None:
    from tests.backbones.test_cifar_resnet import save_random

    save_random(tmp_path, 1)
    backbone = load_backbone(tmp_path)
    with pytest.raises(UnsupportedError, match="cifar_resnet is none"):
        export_merged(backbone, {}, make_head(backbone), tmp_path / "out", card={})


def test_every_image_kind_has_a_processor_that_plain_transformers_reads(tmp_path: Path) -> None:
    for kind in IMAGE_KINDS:
        backbone = load_backbone(save_tiny(kind, tmp_path / kind))
        export_merged(backbone, {}, make_head(backbone), tmp_path / f"{kind}-out", card={})
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / f"{kind}-out")
        pixels = processor(images=raw_rows(backbone), return_tensors="pt")["pixel_values"]
        expected = backbone.collate(backbone.encode(IMAGES), np.arange(5))["pixel_values"]
        torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)
