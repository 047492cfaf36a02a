"""The packaged vision transformer: its files, its card, and what it computes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

import everlora.weights
from everlora.errors import ModelError
from everlora.weights import PACKAGED, packaged_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MEGABYTE = 1_000_000


def load_model() -> torch.nn.Module:
    return AutoModel.from_pretrained(packaged_model(), add_pooling_layer=False).eval()


def test_folder_is_found_without_torch() -> None:
    code = "import sys, everlora.weights as w; print(w.packaged_model()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == packaged_model()
    assert PACKAGED == "packaged"


def test_absent_weights_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everlora.weights, "_FOLDER", "no-such-folder")
    with pytest.raises(ModelError, match="reinstall everlora"):
        packaged_model()


def test_files_are_small_and_float16() -> None:
    folder = packaged_model()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * MEGABYTE
    for name in ("model.safetensors", "classifier.safetensors"):
        with safe_open(folder / name, framework="np") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}


def test_plain_transformers_loads_every_weight_and_no_other() -> None:
    model, info = AutoModel.from_pretrained(packaged_model(), add_pooling_layer=False, output_loading_info=True)
    assert type(model).__name__ == "ViTModel"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.hidden_size == 192
    assert model.config.image_size == 32


def test_output_is_finite_and_tells_images_apart() -> None:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        hidden = load_model()(pixel_values=pixels).last_hidden_state
    assert hidden.shape[0] == 4
    assert hidden.shape[2] == 192
    assert torch.isfinite(hidden).all()
    assert torch.pdist(hidden[:, 0]).min() > 1e-2


def test_processor_scales_pixels_as_the_network_was_trained() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(packaged_model())
    found = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    # Dividing by 255, then subtracting and dividing by 0.5, rounds differently from one division and a subtraction.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_card_states_terms_overlap_and_limits() -> None:
    folder = packaged_model()
    card = (folder / "README.md").read_text(encoding="utf-8")
    for phrase in ("non-commercial research and education", "Class overlap with CIFAR-100", "## Limits", "chimpanzee"):
        assert phrase in card
    terms = (folder / "LICENSE-WEIGHTS.md").read_text(encoding="utf-8")
    assert "non-commercial research and education only" in terms
    assert "Apache-2.0" in terms


def test_figures_come_from_a_finished_run_on_all_images() -> None:
    facts = json.loads((packaged_model() / "training.json").read_text(encoding="utf-8"))
    assert facts["training"]["finished"] is True
    assert facts["training"]["images_in_training_set"] == 100_000
    assert facts["tiny_imagenet"]["validation_images"] == 10_000
    assert (facts["cifar100"]["train_images"], facts["cifar100"]["test_images"]) == (50_000, 10_000)
    assert "--limit" not in facts["training"]["command"] + facts["report"]["command"]


def test_card_is_what_the_script_writes_from_the_measured_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not SCRIPTS.is_dir():
        pytest.skip("the scripts are not part of this installation")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import backbone_card

    facts = json.loads((packaged_model() / "training.json").read_text(encoding="utf-8"))
    backbone_card.write_card(facts, tmp_path)
    assert (tmp_path / "README.md").read_text() == (packaged_model() / "README.md").read_text()


@pytest.mark.slow
def test_accuracy_of_the_card_is_seen_on_the_first_validation_images(shared: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (file,) = (shared / "data" / "tiny-imagenet-32px").glob("validation-*.parquet")
    table = parquet.read_table(file).slice(0, 2000)
    images = [np.asarray(Image.open(io.BytesIO(cell["bytes"].as_py())).convert("RGB")) for cell in table["image"]]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    classifier = load_file(packaged_model() / "classifier.safetensors")
    model = load_model()
    with torch.no_grad():
        token = torch.cat([model(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(250)])
    scores = token @ classifier["weight"].float().T + classifier["bias"].float()
    accuracy = float((scores.argmax(1) == torch.from_numpy(np.asarray(table["label"]))).float().mean())
    facts = json.loads((packaged_model() / "training.json").read_text(encoding="utf-8"))
    # Four standard errors of a share measured on 2000 rows.
    assert accuracy == pytest.approx(facts["tiny_imagenet"]["top1"], abs=0.045)
