"""Small learners for export tests, and what their logits should be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from everlora.backbones.base import Backbone
from everlora.export import ExportHead
from everlora.lowrank import LowRankLinear, attach

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
