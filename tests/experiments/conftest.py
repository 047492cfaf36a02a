"""A tiny network, a tiny data set in memory and a recipe over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from everlora.streams import Examples

TINY = """\
name: tiny
title: Six colours in three tasks
status: runs-here
description: Small enough for a test.
data:
  builtin: sklearn:digits
stream:
  by: class
  increment: 2
  order: seed
model: [packaged]
training: {epochs: 1, batch_size: 10, lr: 1e-2, augment: none}
methods:
  inflora: {method: inflora, label: InfLoRA, set: {rank: 2}}
  free: {method: inflora, label: without projection, set: {rank: 2, projection: false}}
  sequential: {method: sequential, label: Sequential, set: {rank: 2}}
  probe: {method: probe}
  joint: {method: joint, set: {rank: 2}}
default_methods: [inflora, sequential, probe, joint]
seeds: [3, 4]
settings:
  standard: {}
  short:
    training: {epochs: 2}
    set: {rank: 1}
    subsample: {train: 3, test: 2}
    methods: [inflora]
  validation: {evaluate_on: validation}
published:
  - {source: nobody, last: 50.5, last_sd: 0.25, avg: 60, note: made up}
notes: a note
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Counts are compared between processes; the order of sums must not differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> str:
    """The text of a small recipe."""
    return TINY


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 8x8 pixels with random weights."""
    folder = tmp_path_factory.mktemp("network")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def coloured(rows: int, *, seed: int) -> Examples:
    """`rows` noisy images of each of six colours."""
    random = np.random.RandomState(seed)
    names = ["amber", "blue", "cyan", "denim", "ebony", "fawn"]
    colours = np.random.RandomState(0).randint(40, 216, size=(6, 1, 1, 3))
    labels = np.tile(np.arange(6), rows)
    images = np.clip(colours[labels] + random.randint(-30, 31, size=(6 * rows, 8, 8, 3)), 0, 255).astype(np.uint8)
    return Examples(
        modality="image",
        inputs=images,
        labels=np.array([names[label] for label in labels], dtype=object),
        ids=np.arange(6 * rows, dtype=np.int64),
        class_names=tuple(names),
    )


@pytest.fixture
def splits() -> dict[str, Examples]:
    return {"train": coloured(10, seed=1), "test": coloured(5, seed=2)}
