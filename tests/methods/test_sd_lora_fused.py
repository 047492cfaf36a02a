"""Methods on models whose attention computes query, key and value in one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everlora import Learner
from everlora.lowrank import FusedProjection
from everlora.methods.keys import keyed_generator
from everlora.methods.sd_lora import SDLoRA
from tests.methods.sd_lora_builders import WIDTH, ToyEncoder, data, distance, learn, make, weights
from tests.toy import tiny_model, toy_learner, toy_tasks


class Whole(nn.Module):
    """Attention with one fused layer, or three layers made from the same numbers."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        qkv = nn.Linear(WIDTH, 3 * WIDTH).double()
        self.fused = fused
        if fused:
            self.qkv = qkv
            return
        parts = zip(qkv.weight.detach().chunk(3), qkv.bias.detach().chunk(3), strict=True)
        self.apart = nn.ModuleDict()
        for name, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            self.apart[name] = nn.Linear(WIDTH, WIDTH).double()
            self.apart[name].weight.data, self.apart[name].bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.fused else [layer(x) for layer in self.apart.values()]
        return torch.softmax(q @ k.mT / WIDTH**0.5, dim=-1) @ torch.tanh(v)


class WholeEncoder(ToyEncoder):
    feature_dim = WIDTH

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = []
        for number in range(2):
            torch.manual_seed(number)
            layers.append(Whole(fused))
        self.model = nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"kd": True, "kd_tau": 0.9}], ids=str)
def test_slices_learn_what_separate_projections_learn(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(*keys: object) -> torch.Generator:
        # Factors are drawn by the names of the layers, which differ here.
        return keyed_generator(*(str(key).replace(".qkv.", ".").replace(".apart.", ".") for key in keys))

    monkeypatch.setattr("everlora.methods.sd_lora.keyed_generator", by_place)
    found = []
    for fused in (True, False):
        method, encoder = make(WholeEncoder(fused), **options)
        learn(method, encoder, 0, 1, 2)
        found.append((method, encoder))
    (one, whole), (two, apart) = found
    assert [name.replace(".qkv.", ".apart.") for name in one.layers()] == list(two.layers())
    pairs = zip(weights(one).values(), weights(two).values(), strict=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-11
    torch.testing.assert_close(one.past.sealed.multipliers(), two.past.sealed.multipliers(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole.features(data(1).inputs), apart.features(data(1).inputs), rtol=1e-10, atol=1e-10)
    for block, untouched in zip(whole.model, WholeEncoder(True).model, strict=True):
        split, fresh = block.qkv, untouched.qkv.weight
        assert isinstance(split, FusedProjection)
        rows = split.rows("key")
        assert torch.equal(split.effective_weight()[rows], fresh[rows]) and torch.equal(split.weight, fresh)


@pytest.mark.parametrize("method", ["sd_lora", "inflora"])
def test_a_learner_on_a_fused_model_is_exported_reopened_and_goes_on(method: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2", tmp_path / "model")
    learner = toy_learner(tmp_path / "learner", model, method)
    tasks = toy_tasks("text", 2)
    learner.learn(tasks[0], name="one")
    roles = ("query", "value") if method == "sd_lora" else ("key", "value")
    assert set(learner.method.layers()) == {f"h.{i}.attn.c_attn.{role}" for i in (0, 1) for role in roles}
    again = Learner.open(tmp_path / "learner")
    again.learn(tasks[1], name="two")
    third = Learner.open(tmp_path / "learner")
    texts = list(tasks[1].inputs[:4])
    assert [p.label for p in third.predict(texts)] == [p.label for p in again.predict(texts)]
    for mine, other in zip(again.method.layers().values(), third.method.layers().values(), strict=True):
        torch.testing.assert_close(mine.effective_weight(), other.effective_weight(), rtol=1e-6, atol=1e-6)
    for layout in ("merged", "peft"):
        assert third.export(tmp_path / layout, layout).max_difference < 1e-5
    if isinstance(third.method, SDLoRA):
        before = weights(third.method)
        with third.method.model_at(0):
            assert distance(weights(third.method), before) > 1e-6
