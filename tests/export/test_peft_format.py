"""Names and configuration in PEFT's own format."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from everlora.errors import StoreError, UnsupportedError
from everlora.peft_format import from_peft_tensors, lora_config, module_tensors, saved_modules, to_peft_tensors


def test_factors_come_back_as_they_were() -> None:
    factors = {"layers.1.k": (np.ones((2, 5)), np.zeros((3, 2))), "layers.0.k": (np.zeros((0, 5)), np.zeros((3, 0)))}
    tensors = to_peft_tensors(factors)
    assert tensors["base_model.model.layers.1.k.lora_A.weight"] is factors["layers.1.k"][0]
    assert tensors["base_model.model.layers.1.k.lora_B.weight"] is factors["layers.1.k"][1]
    found = from_peft_tensors(tensors)
    assert list(found) == ["layers.0.k", "layers.1.k"]
    assert all(found[name][side] is factors[name][side] for name in factors for side in (0, 1))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.k.lora_A.weight"], "expected adapter tensors named"),
        (["base_model.model.k.lora_embedding_A"], "not a plain LoRA adapter"),
        (["base_model.model.k.lora_A.weight"], "expected both factors of layer k"),
    ],
)
def test_other_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        from_peft_tensors(dict.fromkeys(names, np.zeros((1, 1))))


def test_the_config_keeps_scaling_at_one_and_is_plain_json() -> None:
    config = lora_config({"a.1.k": 4, "a.1.v": 2, "a.2.k": 0}, base_model="owner/name", base_class=("C", "m"))
    assert json.loads(json.dumps(config)) == config
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (4, 4, False, "none")
    assert config["target_modules"] == ["a.1.k", "a.1.v"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {re.escape("a.1.v"): 2}
    with pytest.raises(UnsupportedError, match="no layer has any"):
        lora_config({"a": 0})


def test_layers_whose_names_end_alike_are_told_apart() -> None:
    ranks = {"k": 2, "a.k": 4}
    config = lora_config(ranks, modules=["k", "a", "a.k", "b"])
    assert (config["target_modules"], config["rank_pattern"]) == (["k"], {"^k": 2})
    config = lora_config(ranks)  # which other modules there are is not known
    assert (config["target_modules"], config["rank_pattern"]) == (["a.k", "k"], {"^k": 2})
    assert lora_config({"a.k": 2}, modules=["a.k", "b.k"])["target_modules"] == ["a.k"]
    config = lora_config(ranks, alphas={"k": 1.0, "a.k": 2}, modules=["k", "a.k", "b.k"])
    assert (config["target_modules"], config["alpha_pattern"]) == (r"a\.k|k", {"^k": 1.0})


def test_modules_that_are_kept_whole() -> None:
    config = lora_config({"k": 2}, modules_to_save=["norm", "b.norm"])
    assert config["modules_to_save"] == ["norm", "b.norm"] and lora_config({"k": 2})["modules_to_save"] is None
    assert saved_modules(["norm"], ["a.norm", "norm", "norm.x"]) == ["a.norm", "norm"]
    assert saved_modules([], ["norm"]) == []
    assert module_tensors("a.norm", {"running_mean": 1}) == {"base_model.model.a.norm.running_mean": 1}


def test_no_torch_is_imported() -> None:
    code = "import sys, everlora.peft_format; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
