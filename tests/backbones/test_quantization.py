"""Bases in 4 and 8 bits: loaded, adapted, trained and exported on the CPU, or refused in a sentence."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from everlora.backbones import quantization
from everlora.backbones.huggingface import quiet_transformers
from everlora.backbones.quantization import QUANTIZATIONS, chosen_quantization, is_quantized, quantization_options
from everlora.errors import OptionError, TargetError, UnsupportedError
from everlora.lowrank import LowRankLinear, attach, detach
from tests.export.language_builders import (
    export,
    load_language_model,
    readme_code,
    run_readme,
    save_language_model,
    teach,
    tokens_of,
)

BITS = ("4bit", "8bit")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quant) is not installed"
)


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture
def fresh_trials() -> Iterator[None]:
    """No outcome of an earlier trial is remembered, nor that of this test afterwards."""
    quantization._obstacle.cache_clear()
    yield
    quantization._obstacle.cache_clear()


def factors_of(layers: Any) -> list[nn.Parameter]:
    return [factor for layer in layers.values() for factor in (layer.down, layer.up)]


def test_unknown_names_are_refused() -> None:
    assert QUANTIZATIONS == ("none", *BITS) and quantization_options("none", torch.float32) == {}
    with pytest.raises(OptionError, match="unknown quantization '4bits'; did you mean"):
        quantization_options("4bits", torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_without_bitsandbytes_the_extra_is_named(bits: str, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "bitsandbytes" else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    message = f"quantization={bits} needs bitsandbytes, which is not installed; run `pip install everlora[quant]`"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        load_language_model(stories, quantization=bits)


@needs_bitsandbytes
@pytest.mark.usefixtures("fresh_trials")
@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_where_it_cannot_compute_it_is_refused_in_one_sentence(
    bits: str, kind: str, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("only CUDA knows this product\nand a second line")

    monkeypatch.setattr(quantization, "_device_of_weights", lambda: "cpu")
    monkeypatch.setattr(getattr(bitsandbytes.nn, kind), "forward", fail)
    with pytest.raises(UnsupportedError) as caught:
        load_language_model(stories, quantization=bits)
    assert str(caught.value) == (
        f"quantization={bits} cannot be trained through on cpu here (only CUDA knows this product); use it on a "
        "machine with CUDA, with a newer bitsandbytes, or leave it out"
    )


@needs_bitsandbytes
@pytest.mark.usefixtures("fresh_trials")
@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_products_without_a_gradient_are_found_out(bits: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(quantization, "_device_of_weights", lambda: "cpu")
    right = getattr(bitsandbytes.nn, kind).forward
    monkeypatch.setattr(getattr(bitsandbytes.nn, kind), "forward", lambda layer, x: right(layer, x.detach()))
    with pytest.raises(UnsupportedError, match=rf"quantization={bits} cannot be trained through on cpu here \(.*grad"):
        quantization_options(bits, torch.float32)


@needs_bitsandbytes
@pytest.mark.usefixtures("fresh_trials")
def test_a_build_that_cannot_be_imported_is_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    right = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name == "bitsandbytes":
            raise OSError("libbitsandbytes_cpu.so: cannot open shared object file")
        return right(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UnsupportedError, match="cannot open shared object file"):
        quantization_options("4bit", torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_is_what_was_asked_for(bits: str, stories: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        backbone = load_language_model(stories, quantization=bits)
        backbone.features(backbone.collate(backbone.encode([json.dumps({"text": "A cat sat."})]), [0]))
    assert not caplog.records and torch.equal(torch.rand(2), expected)
    plain = load_language_model(stories)
    assert (chosen_quantization(backbone.model), chosen_quantization(plain.model)) == (bits, "none")
    assert is_quantized(backbone.model) and not is_quantized(plain.model)
    layer = backbone.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[bits]
    assert (layer.in_features, layer.out_features) == (64, 64)
    assert backbone.num_parameters == plain.num_parameters and backbone.default_targets == plain.default_targets
    assert backbone.dtype == backbone.output_head.weight.dtype == torch.float32
    tokens = tokens_of(backbone)
    with torch.no_grad():
        found, exact = (model(input_ids=tokens).logits for model in (backbone.model, plain.model))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.3


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_adapted_layers_take_their_sizes_from_the_layer(bits: str, stories: Path) -> None:
    backbone = load_language_model(stories, quantization=bits)
    tokens = tokens_of(backbone)
    with torch.no_grad():
        before = backbone.model(input_ids=tokens).logits
        layers = attach(backbone.model, "re:.*layers\\.0\\..*_proj", 4)
        assert torch.equal(backbone.model(input_ids=tokens).logits, before)  # `up` starts at zero
    assert len(layers) == 7
    for layer in layers.values():
        assert layer.resolved_mode == "factored" and layer.up.dtype == torch.float32
        assert (layer.down.shape[1], layer.up.shape[0]) == (layer.base.in_features, layer.base.out_features)
        with pytest.raises(UnsupportedError, match=r"a quantised base weight .* has no dense sum"):
            layer.effective_weight()
    base = backbone.model.get_submodule("model.layers.1.self_attn.q_proj")
    with pytest.raises(UnsupportedError, match=r"a quantised base weight .* cannot be folded"):
        LowRankLinear(base, 2, forward_mode="folded")
    detach(backbone.model)
    with torch.no_grad():
        assert torch.equal(backbone.model(input_ids=tokens).logits, before)


def test_packed_weights_of_a_floating_point_dtype_are_not_folded() -> None:
    """Weights in 4 bits may be stored as float32 numbers that hold several each, for sharding."""
    base = nn.Linear(8, 6)
    base.weight = nn.Parameter(torch.zeros(6, 1))
    layer = LowRankLinear(base, 2)
    assert layer.resolved_mode == "factored" and layer.down.shape == (2, 8)
    with pytest.raises(UnsupportedError, match="cannot be folded"):
        LowRankLinear(base, 2, forward_mode="folded")


@needs_bitsandbytes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_the_factors_are_those_of_peft(bits: str, training: bool, stories: Path) -> None:
    backbone = load_language_model(stories, quantization=bits)
    layers = teach(backbone).layers()
    other = load_language_model(stories, quantization=bits)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with quiet_transformers():
        model = peft.get_peft_model(other.model, config)
    theirs = {name: model.base_model.model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        with torch.no_grad():
            theirs[name].lora_A["default"].weight.copy_(layer.down)
            theirs[name].lora_B["default"].weight.copy_(layer.up)
    tokens = tokens_of(backbone)
    backbone.train(training)
    model.train(training)
    losses = []
    for network in (backbone.model, model):
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for name, layer in layers.items():
        pairs = ((layer.down, theirs[name].lora_A), (layer.up, theirs[name].lora_B))
        for own, factor in pairs:
            assert own.grad is not None and bool(own.grad.isfinite().all()) and bool(own.grad.any())
            torch.testing.assert_close(own.grad, factor["default"].weight.grad, rtol=1e-4, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_factors_train_and_learn_again_after_a_prediction(
    bits: str, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a CPU that would repack 4-bit weights at the first prediction, after which they have no gradient.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    backbone = load_language_model(stories, quantization=bits)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in backbone.model.modules())
    layers = attach(backbone.model, backbone.default_targets, 4, generator=torch.Generator().manual_seed(0))
    frozen = {n: t.clone() for n, t in backbone.model.state_dict().items() if ".up" not in n and ".down" not in n}
    optimizer = torch.optim.AdamW(factors_of(layers), lr=1e-2)
    tokens, losses = tokens_of(backbone, rows=4, length=24), []
    for _ in range(8):
        backbone.eval()
        with torch.no_grad():
            backbone.model(input_ids=tokens)
        backbone.train()
        loss = backbone.model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(factor.grad is not None and bool(factor.grad.isfinite().all()) for factor in factors_of(layers))
        assert all(bool(layer.up.grad.any()) for layer in layers.values())  # the lowest block's, too
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_is_exported_and_generates_the_same_text(
    bits: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_language_model(stories, quantization=bits)
    taught = teach(backbone, past=1)
    prompts = backbone.inputs.encode_prompts([json.dumps({"text": "Once upon a time"})])
    batch = backbone.inputs.collate_prompts(prompts, device=backbone.device)
    del batch["position_ids"]
    with torch.no_grad(), quiet_transformers():
        output = backbone.model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=backbone.inputs.pad)
    expected = backbone.inputs.decode(output[0, len(prompts[0]) :])
    with pytest.raises(UnsupportedError, match=r"adapters cannot be merged into quantised weights .* export peft"):
        export(taught, backbone, tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()
    assert export(taught, backbone, tmp_path / "out", "peft").max_difference < 1e-2
    code = readme_code(tmp_path / "out")
    assert f"load_in_{bits}=True" in code and ("nf4" in code) == (bits == "4bit")
    assert f"| Base weights while learning | {bits} |" in (tmp_path / "out" / "README.md").read_text()
    names = run_readme(tmp_path / "out", monkeypatch, example=False)
    assert names["generate"]("Once upon a time", 8) == expected and expected.strip()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(stories.resolve())  # the base itself is not quantised


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_fused_projections_are_adapted_whole(bits: str, tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("gpt2", tmp_path / "base"), quantization=bits)
    with pytest.raises(TargetError, match="the fused layer c_attn, which cannot be taken apart; give targets=c_attn"):
        _ = backbone.default_targets
    taught = teach(backbone, targets=["c_attn"])
    assert {tuple(layer.up.shape) for layer in taught.layers().values()} == {(96, 3)}
    assert export(taught, backbone, tmp_path / "out", "peft").max_difference < 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_stored_in_few_bits_is_known_as_such(bits: str, stories: Path, tmp_path: Path) -> None:
    with quiet_transformers():
        load_language_model(stories, quantization=bits).model.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((stories / name).read_bytes())
    backbone = load_language_model(tmp_path / "small")
    assert is_quantized(backbone.model) and chosen_quantization(backbone.model) == "none"
    taught = teach(backbone)
    with pytest.raises(UnsupportedError, match="cannot be merged into quantised weights"):
        export(taught, backbone, tmp_path / "merged", "merged")
    export(taught, backbone, tmp_path / "out", "peft")
    assert "BitsAndBytesConfig" not in readme_code(tmp_path / "out")  # the base says itself what it is
