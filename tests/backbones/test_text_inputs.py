"""Texts: tokenised once, padded by batch, truncation counted."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from everlora.backbones import load_backbone
from everlora.backbones.base import Backbone
from everlora.errors import DataError, OptionError, ShapeError
from tests.tiny_models import save_tiny

TEXTS = ["red", "where is my parcel", "my card", ""]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(save_tiny("bert", tmp_path_factory.mktemp("bert")), max_length=6)


def test_a_batch_is_padded_to_its_own_longest_row(backbone: Backbone) -> None:
    encoded = backbone.encode(TEXTS)
    lengths = backbone.lengths(encoded)
    assert lengths is not None and lengths.tolist() == [3, 6, 4, 2]
    batch = backbone.collate(encoded, [2, 0])
    assert batch["input_ids"].tolist() == [[2, 7, 10, 3], [2, 11, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert torch.equal(batch["token_type_ids"], torch.zeros(2, 4, dtype=torch.int64))
    mask = backbone.token_mask(batch)
    assert mask is not None and mask.dtype == torch.bool and mask.tolist() == batch["attention_mask"].bool().tolist()


def test_models_without_token_types_get_none(tmp_path: Path) -> None:
    folder = save_tiny("distilbert", tmp_path)
    backbone = load_backbone(folder)
    backbone.inputs.uses_token_types = False
    assert set(backbone.collate(backbone.encode(TEXTS), [0])) == {"input_ids", "attention_mask"}


def test_truncation_is_counted_and_logged(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    exact, longer = "where is my parcel", "where is my lost parcel red"
    with caplog.at_level(logging.WARNING, "everlora"):
        encoded = backbone.encode([exact, longer, longer, "red"])
    assert encoded.num_truncated == 2
    assert "2 of 4 texts are longer than 6 tokens" in caplog.text
    assert encoded.row(1).tolist() == [2, 5, 6, 7, 9, 3]  # the closing token stays
    caplog.clear()
    assert backbone.encode([exact]).num_truncated == 0 and not caplog.text


def test_rows_can_be_selected(backbone: Backbone) -> None:
    encoded = backbone.encode(TEXTS, ids=[4, 3, 2, 1])
    part = encoded.select(np.array([3, 1]))
    assert part.ids.tolist() == [1, 3] and len(part) == 2
    assert backbone.collate(part, [1])["input_ids"].tolist() == backbone.collate(encoded, [1])["input_ids"].tolist()
    assert len(encoded.select([])) == 0


def test_no_texts_are_no_rows(backbone: Backbone) -> None:
    assert len(backbone.encode([])) == 0


def test_wrong_inputs_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected text in row 1, found int"):
        backbone.encode(["red", 3])
    with pytest.raises(DataError, match="expected 1 row ids"):
        backbone.encode(["red"], ids=[1, 2])
    with pytest.raises(OptionError, match="no augmentation for texts"):
        backbone.collate(backbone.encode(["red"]), [0], augment=lambda pixels, ids: pixels)
    with pytest.raises(ShapeError, match="flat list of rows"):
        backbone.collate(backbone.encode(["red"]), [[0]])
    vit = load_backbone(save_tiny("vit", tmp_path))
    with pytest.raises(DataError, match="expected encoded images, found encoded texts"):
        vit.collate(backbone.encode(["red"]), [0])
    with pytest.raises(DataError, match="expected encoded texts, found encoded images"):
        backbone.collate(vit.encode(np.zeros((1, 8, 8, 3), np.uint8)), [0])
    assert vit.lengths(vit.encode(np.zeros((1, 8, 8, 3), np.uint8))) is None
    assert vit.token_mask({"pixel_values": torch.zeros(1, 3, 8, 8)}) is None


def test_a_training_batch_runs_in_groups_of_like_length_with_the_same_features(backbone: Backbone) -> None:
    texts = [" ".join(["red"] * (1 + index % 4)) + " card" for index in range(19)]
    batch = backbone.collate(backbone.encode(texts), range(19))
    seen: list[tuple[int, ...]] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    grouped = backbone.features(batch)
    with torch.no_grad():
        whole = backbone.features(batch)
    hook.remove()
    torch.testing.assert_close(grouped, whole, rtol=1e-5, atol=1e-5)
    assert seen[-1] == (19, 6) and len(seen) == 3
    assert sum(rows * tokens for rows, tokens in seen[:-1]) < 19 * 6
