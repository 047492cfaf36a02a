"""The script that trains the packaged network: its parts in closed form, and a run on a handful of images."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ["left", "right", "up"]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not SCRIPTS.is_dir():
        pytest.skip("the scripts are not part of this installation")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(name)


def write_images(folder: Path, count: int) -> np.ndarray:
    """Write `count` random lossless images as a parquet set with class names in its metadata; return the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    cells = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png")
        cells.append({"bytes": stream.getvalue(), "path": None})
    features = {"label": {"names": NAMES}}
    table = arrow.table({"image": cells, "label": [index % 3 for index in range(count)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir()
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    return pixels


def options(**changes: float) -> argparse.Namespace:
    return argparse.Namespace(**{"shift": 0, "min_scale": 1.0, "erase": 0.0, **changes})


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("backbone_data", monkeypatch)
    expected = write_images(tmp_path / "set", 5)
    pixels, labels, names = data.read_images(tmp_path / "set", "train", "label", tmp_path / "cache")
    assert np.array_equal(pixels.numpy(), expected.transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert names == NAMES
    monkeypatch.setattr(data.Image, "open", None)
    again, _, _ = data.read_images(tmp_path / "set", "train", "label", tmp_path / "cache")
    assert torch.equal(again, pixels)


def test_without_shift_an_image_is_itself_or_its_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("backbone_data", monkeypatch)
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    found = data.augment(images, options())
    same = (found == images).flatten(1).all(1)
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_a_shift_moves_the_image_by_whole_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("backbone_data", monkeypatch)
    torch.manual_seed(0)
    columns = torch.arange(32.0).expand(64, 3, 32, 32)
    found = data.augment(columns, options(shift=4))[:, 0, 0, 8:24]
    steps = found[:, 1:] - found[:, :-1]
    offsets = torch.where(steps[:, 0] > 0, found[:, 0] - 8, 23 - found[:, 0])
    assert (steps.abs() == 1).all()
    assert sorted(set(offsets.tolist())) == [-4, -3, -2, -1, 0, 1, 2, 3, 4]


def test_zoom_and_erasing_keep_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("backbone_data", monkeypatch)
    torch.manual_seed(0)
    found = data.augment(torch.ones(64, 3, 32, 32), options(min_scale=0.3, erase=0.5))
    erased = (found == 0).flatten(1).any(1)
    # Interpolation between equal pixels rounds in the last bits.
    assert torch.minimum((found - 1).abs(), found.abs()).max() < 1e-5
    assert 0 < int(erased.sum()) < 64


def test_orthogonalised_matrices_have_singular_values_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    muon = script("muon", monkeypatch)
    torch.manual_seed(0)
    values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(3, 16, 40)))
    # The coefficients trade exactness for speed: they end between 0.68 and 1.13.
    assert values.min() > 0.65
    assert values.max() < 1.2


def test_a_step_of_muon_turns_a_tall_matrix_as_its_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    muon = script("muon", monkeypatch)
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 24), torch.randn(8, 24)
    wide, tall = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.T.clone())
    wide.grad, tall.grad = gradient, gradient.T
    muon.Muon([wide, tall], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(wide.data, tall.data.T)
    expected = start * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 24**0.5 * muon.orthogonalise(gradient[None])[0]
    torch.testing.assert_close(wide.data, expected, atol=1e-5, rtol=1e-4)


def test_schedule_warms_up_and_ends_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = script("pretrain_backbone", monkeypatch)
    assert pretrain.learning_rate(0.0, 1.0, 0.1) == pytest.approx(0.01)
    assert pretrain.learning_rate(0.1, 1.0, 0.1) == pytest.approx(1.0)
    assert pretrain.learning_rate(0.55, 1.0, 0.1) == pytest.approx(0.5)
    assert pretrain.learning_rate(1.2, 1.0, 0.1) == pytest.approx(0.0)


def test_forward_on_all_patches_is_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = script("pretrain_backbone", monkeypatch)
    torch.manual_seed(0)
    shape = argparse.Namespace(width=16, layers=2, heads=2, patch_size=5)
    model = pretrain.build_model(shape, NAMES).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pretrain.forward(model, images, 1.0), model(pixel_values=images).logits)
        assert not torch.allclose(pretrain.forward(model, images, 0.5), model(pixel_values=images).logits)


def test_run_by_steps_repeats_bit_for_bit_and_exports_a_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = script("pretrain_backbone", monkeypatch)
    write_images(tmp_path / "set", 24)
    digests = []
    for name in ("first", "second"):
        line = (
            f"train --data {tmp_path}/set --cache {tmp_path}/cache --out {tmp_path}/{name} --epochs 2 --batch-size 8 "
        )
        line += "--width 16 --layers 1 --heads 2 --first-export-seconds 0 --export-seconds 0 --erase 0.5 --mixup 0.2"
        monkeypatch.setattr(sys, "argv", ["pretrain_backbone.py", *line.split()])
        pretrain.train(pretrain.parse(line.split()))
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
        facts = json.loads((tmp_path / name / "training.json").read_text())["training"]
        assert (facts["finished"], facts["steps"], facts["images_seen"]) == (True, 6, 48)
        assert str(tmp_path) not in facts["command"]
    assert digests[0] == digests[1]
    model = pretrain.ViTForImageClassification.from_pretrained(tmp_path / "first").vit
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_budget_ends_the_run_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = script("pretrain_backbone", monkeypatch)
    clock = pretrain.Clock(total_steps=None, budget_seconds=10.0, started=100.0)
    monkeypatch.setattr(pretrain.time, "monotonic", lambda: 104.0)
    assert clock.progress() == pytest.approx(0.4)
    assert pretrain.Clock(total_steps=8, budget_seconds=None, step=2).progress() == pytest.approx(0.25)


def test_probe_reaches_the_optimum_of_separable_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    report = script("backbone_report", monkeypatch)
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    rows = torch.nn.functional.one_hot(labels).float() + 0.1 * torch.randn(300, 3)
    scores, facts = report.linear_probe(rows[:200], labels[:200], rows[200:], 3)
    assert report.accuracy(scores, labels[200:]) == 1.0
    assert set(facts["held_out_accuracy"]) == {f"{penalty:g}" for penalty in report.PENALTIES}
    inputs = torch.cat([rows, torch.ones(300, 1)], dim=1)
    weight = report.fit_probe(inputs, labels, 1e-2, num_classes=3, iterations=200).requires_grad_()
    loss = torch.nn.functional.cross_entropy(inputs @ weight, labels) + 0.5 * 1e-2 * weight[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4


def test_overlap_refuses_a_table_with_names_the_data_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    report = script("backbone_report", monkeypatch)
    monkeypatch.setattr(report, "SAME_THING", {"sea": ["seashore"]})
    monkeypatch.setattr(report, "CLOSE_RELATIVES", {})
    facts, shared = report.overlap(["seashore", "Lawn mower", "alp"], ["sea", "lawn_mower", "cup"])
    assert facts["same_name"] == ["lawn_mower"]
    assert shared.tolist() == [True, True, False]
    with pytest.raises(SystemExit, match="seashore"):
        report.overlap(["alp"], ["sea", "cup"])
