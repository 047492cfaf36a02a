"""Small streams and learners that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everlora import Learner
from everlora.methods import method_spec
from everlora.streams import Examples
from tests.tiny_models import save_tiny

FAST: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "augment": "none"}
WORDS = ("where", "is", "my", "parcel", "lost", "card", "red", "green", "blue")


def toy_images(classes: Sequence[str], rows: int = 12, *, seed: int = 0, size: int = 16) -> Examples:
    """Rows of classes that differ in their mean colour and one bright stripe, `rows` each."""
    random = np.random.RandomState(seed)
    images, labels = [], []
    for name in classes:
        number = sum(map(ord, name)) % 13
        base = np.random.RandomState(number).randint(40, 200, size=(1, 1, 3))
        block = np.clip(base + random.randint(-30, 30, size=(rows, size, size, 3)), 0, 255)
        block[:, number % size, :, number % 3] = 255
        images.append(block.astype(np.uint8))
        labels += [name] * rows
    ids = np.arange(len(labels)) + 1000 * seed
    return Examples("image", np.concatenate(images), np.array(labels, dtype=object), ids)


def toy_texts(classes: Sequence[str], rows: int = 12, *, seed: int = 0) -> Examples:
    """Rows of word salads in which each class prefers two words of its own."""
    random = np.random.RandomState(seed)
    texts, labels = [], []
    for name in classes:
        number = sum(map(ord, name))
        own = [WORDS[number % 9], WORDS[(number * 5 + 1) % 9]]
        for _ in range(rows):
            words = [own[random.randint(2)] if random.rand() < 0.7 else WORDS[random.randint(9)] for _ in range(6)]
            texts.append(" ".join(words[: random.randint(2, 7)]))
            labels.append(name)
    ids = np.arange(len(labels)) + 1000 * seed
    return Examples("text", tuple(texts), np.array(labels, dtype=object), ids)


def toy_tasks(modality: str, count: int = 3) -> list[Examples]:
    """Tasks of two classes each."""
    make = toy_images if modality == "image" else toy_texts
    names = [f"class {letter}" for letter in "abcdefgh"]
    return [make(names[2 * index : 2 * index + 2], seed=index + 1) for index in range(count)]


def toy_learner(folder: Path, model: Path, method: str, **options: Any) -> Learner:
    """A learner on a tiny model, quick to train."""
    options = {**FAST, "rank": 2, **options}
    if "rank" not in method_spec(method).option_names:
        del options["rank"]
    return Learner.create(folder, model=model, method=method, **options)


def tiny_model(kind: str, folder: Path) -> Path:
    """A tiny model folder of one architecture."""
    return save_tiny(kind, folder)
