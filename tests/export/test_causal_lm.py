"""Exported language models load with plain transformers and plain peft, and compute what the learner does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import ModelError, OptionError, StoreError, UnsupportedError
from everlora.export import language_layout
from everlora.language.generation import write
from tests.export.language_builders import (
    CHAT,
    export,
    load_language_model,
    logits_of,
    readme_code,
    run_readme,
    save_language_model,
    teach,
    tokens_of,
)

FORMATS = ("merged", "peft")
PROMPTS = ("Once upon a time", "The dog said: what is", "Lily and Tom")


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("past", [0, 2])
def test_plain_tools_give_the_learners_logits(kind: str, past: int, tmp_path: Path) -> None:
    source = save_language_model(kind, tmp_path / "base")
    backbone = load_language_model(source)
    tokens = tokens_of(backbone)
    untaught = logits_of(backbone.model, tokens)
    taught = teach(backbone, past=past)
    expected = logits_of(backbone.model, tokens)
    assert (expected - untaught).abs().max() > 0.1  # the adapters matter
    for name in FORMATS:
        report = export(taught, backbone, tmp_path / name, name)
        assert report.max_difference < 1e-4 and not report.truncation
        assert report.model_class == type(backbone.model).__name__
    with quiet_transformers():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    close(logits_of(merged.eval(), tokens), expected)
    close(logits_of(adapted.eval(), tokens), expected)
    assert torch.equal(logits_of(backbone.model, tokens), expected)  # the learner is as it was


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("tied", tmp_path / "base"))
    export(teach(backbone), backbone, tmp_path / "out", "merged")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert sum("embed" in name or "lm_head" in name for name in names) == 1
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_an_adapted_output_layer_is_not_merged_into_the_embedding(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("tied", tmp_path / "base"))
    taught = teach(backbone, targets=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"shares its weight with the embedding.* export\s+peft"):
        export(taught, backbone, tmp_path / "out", "merged")
    assert export(taught, backbone, tmp_path / "peft", "peft").max_difference < 1e-4
    free = load_language_model(save_language_model("llama", tmp_path / "free"))
    assert export(teach(free, targets=["lm_head"]), free, tmp_path / "merged", "merged").max_difference < 1e-4


def test_an_export_that_gives_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    taught = teach(backbone)
    right = language_layout.LanguageLayout.load

    def wrong(layout: Any, place: Path) -> Any:
        model = right(layout, place)
        with torch.no_grad():
            model.get_output_embeddings().weight[3] += 1.0
        return model

    monkeypatch.setattr(language_layout.LanguageLayout, "load", wrong)
    with pytest.raises(ModelError, match="expected the export to give the learner's logits, found a difference of"):
        export(taught, backbone, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_vllm_can_load_the_adapter_by_its_layout(tmp_path: Path) -> None:
    """What its loader asks of a LoRA folder; it reads one rank and one alpha, and no pattern."""
    source = save_language_model("llama", tmp_path / "base")
    backbone = load_language_model(source)
    names = [f"model.layers.{block}.self_attn.{layer}" for block in (0, 1) for layer in ("q_proj", "v_proj")]
    ranks = {name: 2 + number for number, name in enumerate(names)}
    taught = teach(backbone, rank=ranks)
    for name, layer in taught.layers().items():
        layer.scale = 8 / ranks[name]  # of one alpha
    export(taught, backbone, tmp_path / "out", "peft")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["modules_to_save"] is None and not config["use_dora"] and not config["use_rslora"]
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(source.resolve())
    assert (config["r"], type(config["r"]), type(config["lora_alpha"])) == (5, int, int)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB"}
    scaling = config["lora_alpha"] / config["r"]
    for name, layer in taught.layers().items():
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert down.shape == (ranks[name], 32) and up.shape[1] == ranks[name] <= config["r"]
        close(scaling * up @ down, layer.scale * layer.up.detach() @ layer.down.detach())
        # PEFT, which does read patterns, comes to the same scaling.
        pattern = name.replace(".", r"\.")
        own = config["alpha_pattern"].get(pattern, config["lora_alpha"])
        assert own / config["rank_pattern"].get(pattern, config["r"]) == scaling


@pytest.mark.parametrize("variant", [None, "plastic"])
def test_variants_become_adapters_of_their_own(variant: str | None, tmp_path: Path) -> None:
    source = save_language_model("tied", tmp_path / "base")
    backbone = load_language_model(source)
    taught, tokens = teach(backbone, variants=("stable", "plastic")), tokens_of(backbone)
    expected = {}
    for name in ("stable", "plastic"):
        with taught.predicting(name):
            expected[name] = logits_of(backbone.model, tokens)
    assert (expected["stable"] - expected["plastic"]).abs().max() > 0.1
    report = export(taught, backbone, tmp_path / "out", "peft", variant=variant)
    assert report.max_difference < 1e-4
    places = {"stable": "stable", "plastic": "plastic"} if variant is None else {variant: "."}
    for name, place in places.items():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "out" / place))
        with quiet_transformers():
            model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out" / place))
        close(logits_of(model.eval(), tokens), expected[name])
    info = json.loads((tmp_path / "out" / "export.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    if variant is None:
        assert info["variants"] == ["stable", "plastic"]
        assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"stable", "plastic"}
        assert "`stable/` is what the learner predicts with by default" in text and "`plastic/`" in text
        assert 'f"{folder}/stable"' in readme_code(tmp_path / "out")
    else:
        assert "variants" not in info and "| Weights | plastic |" in text
        assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_merged_export_holds_the_variant_that_predicts_or_the_one_asked_for(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    taught, tokens = teach(backbone, variants=("stable", "plastic")), tokens_of(backbone)
    own = logits_of(backbone.model, tokens)
    for asked, name in ((None, "stable"), ("plastic", "plastic")):
        export(taught, backbone, tmp_path / name, "merged", variant=asked)
        with taught.predicting(name):
            expected = logits_of(backbone.model, tokens)
        with quiet_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        close(logits_of(model.eval(), tokens), expected)
        assert f"| Weights | {name} |" in (tmp_path / name / "README.md").read_text()
    assert torch.equal(logits_of(backbone.model, tokens), own)


def test_wrong_wishes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    taught = teach(backbone)
    out = tmp_path / "out"
    for kind in FORMATS:
        with pytest.raises(OptionError, match="one kind of weights, so no variant can be chosen"):
            export(taught, backbone, out, kind, variant="stable")
        with pytest.raises(OptionError, match="there is no variant 'stabel'; did you mean"):
            export(type(taught)(taught.adapted, {"stable": {}, "plastic": {}}), backbone, out, kind, variant="stabel")
    with pytest.raises(OptionError, match="there is no export format 'pfet'"):
        export(taught, backbone, out, "pfet")
    with pytest.raises(OptionError, match="max_rank is for format='peft'"):
        export(taught, backbone, out, "merged", max_rank=2)
    with pytest.raises(OptionError, match="rank"):
        export(taught, backbone, out, "peft", max_rank=0)
    with pytest.raises(ModelError, match=r"expected layer .* found it detached"):
        export(taught, load_language_model(tmp_path / "base"), out, "merged")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(StoreError, match="in use"):
        export(taught, backbone, tmp_path / "used", "peft")
    with torch.no_grad():
        backbone.model.get_submodule("model.norm").weight += 1
    with pytest.raises(UnsupportedError, match=r"'model\.norm' is not the base's any more.*export merged"):
        export(taught, backbone, out, "peft")
    assert not out.exists()
    assert export(taught, backbone, out, "merged").max_difference < 1e-4  # which has a place for it


def test_a_cut_adapter_says_by_how_much(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    taught = teach(backbone, variants=("stable", "plastic"))
    report = export(taught, backbone, tmp_path / "out", "peft", max_rank=1)
    assert set(report.truncation) == {f"{v}/{name}" for v in ("stable", "plastic") for name in taught.layers()}
    assert all(0 < error < 1 for error in report.truncation.values())
    assert {
        t.shape[0] for n, t in load_file(tmp_path / "out/stable/adapter_model.safetensors").items() if "_A" in n
    } == {1}


def test_the_readme_is_a_card(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    export(teach(backbone), backbone, tmp_path / "out", "merged")
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("library_name: transformers", "pipeline_tag: text-generation", "owner/name", "ab" * 32):
        assert part in text
    assert "| 1 | first \\| task |" in text and "| 2 | second |" in text
    assert not any(word in text.lower() for word in ("pooling", "classes", "labels", "head.safetensors"))
    info = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (info["kind"], info["model_class"]) == ("merged", "LlamaForCausalLM")
    assert info["max_logit_difference"] < 1e-4


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("auto", "card red\n"),
        ("chat", "[user] card red card "),
        ("lost {instruction} and\n{input}\nblue", "lost card red and\nblue"),
        (CHAT.replace("card ", "my "), "[user] card red my "),
        ("{{ instruction }} is {{ input }}.", "card red is ."),
    ],
    ids=["plain", "chat", "format", "own chat", "jinja"],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_prompts_are_written_as_in_training(
    kind: str, template: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_language_model("llama", tmp_path / "base")
    if template == "chat":
        (source / "chat_template.jinja").write_text(CHAT)
    backbone = load_language_model(source, template=template)
    export(teach(backbone), backbone, tmp_path / "out", kind)
    names = run_readme(tmp_path / "out", monkeypatch)
    assert names["prompt_of"]("card red") == expected
    row = json.dumps({"instruction": "card red", "input": "", "output": "x"})
    ids = names["tokenizer"](expected, add_special_tokens=False).input_ids
    assert ids == backbone.inputs.encode_prompts([row])[0]
    has_chat = "messages" in template or template == "chat"
    assert (names["tokenizer"].chat_template == backbone.inputs.template_text) == has_chat
    assert backbone.tokenizer.chat_template == (CHAT if template == "chat" else None)  # the learner's is left alone


def trained(backbone: Any, *, steps: int = 5, **options: Any) -> Any:
    """Factors after a few steps on made-up tokens."""
    taught = teach(backbone, **options)
    factors = [factor for layer in taught.layers().values() for factor in (layer.down, layer.up)]
    with torch.no_grad():
        for layer in taught.layers().values():
            layer.up.zero_()
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    tokens = tokens_of(backbone, rows=4, length=24)
    losses = []
    for _ in range(steps):
        loss = backbone.model(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    return taught


def continued(backbone: Any, prompt: str) -> str:
    """What the learner's network generates in place."""
    batch = backbone.inputs.collate_prompts(
        backbone.inputs.encode_prompts([json.dumps({"text": prompt})]), device=backbone.device
    )
    with torch.no_grad(), quiet_transformers():
        output = backbone.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=backbone.inputs.pad,
        )
    return str(backbone.inputs.decode(output[0, batch["input_ids"].shape[1] :]))


@pytest.mark.parametrize("kind", FORMATS)
def test_penalties_in_the_folder_of_the_model_count_no_more_than_in_the_learner(
    kind: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(stories, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.9, "do_sample": True}))
    backbone = load_language_model(base)
    taught = trained(backbone)
    tokens = backbone.inputs.encode_prompts([json.dumps({"text": prompt}) for prompt in PROMPTS])
    expected = [one.text for one in write(backbone, tokens, max_new_tokens=32)]
    export(taught, backbone, tmp_path / "out", kind)
    names = run_readme(tmp_path / "out", monkeypatch)
    assert [names["generate"](prompt, 32) for prompt in PROMPTS] == expected
    penalised = names["model"].generate(
        torch.tensor([tokens[0]]), max_new_tokens=32, do_sample=False, repetition_penalty=1.9
    )
    assert names["tokenizer"].decode(penalised[0, len(tokens[0]) :], skip_special_tokens=True) != expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_exports_generate_the_text_of_the_learner(
    kind: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_language_model(stories)
    before = [continued(backbone, prompt) for prompt in PROMPTS]
    taught = trained(backbone)
    expected = [continued(backbone, prompt) for prompt in PROMPTS]
    assert all(expected) and expected != before
    assert export(taught, backbone, tmp_path / "out", kind).max_difference < 1e-3
    names = run_readme(tmp_path / "out", monkeypatch)
    assert [names["generate"](prompt, 32) for prompt in PROMPTS] == expected
    assert capsys.readouterr().out.strip()  # the example at its end
    files = set(os.listdir(tmp_path / "out"))
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "export.json"} <= files
    if kind == "merged":
        stored = (tmp_path / "out" / "generation_config.json").read_text()
        assert stored == (stories / "generation_config.json").read_text()


def test_a_bfloat16_base_trains_in_factored_form_and_keeps_its_dtype(stories: Path, tmp_path: Path) -> None:
    backbone = load_language_model(stories, dtype="bfloat16")
    taught = trained(backbone, past=1)
    assert all(layer.resolved_mode == "factored" for layer in taught.layers().values())
    assert all(layer.up.dtype == layer.up.grad.dtype == torch.float32 for layer in taught.layers().values())
    for kind in FORMATS:
        export(taught, backbone, tmp_path / kind, kind)
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "peft" / "adapter_model.safetensors").values()} == {torch.float32}
    assert "dtype=torch.bfloat16" in readme_code(tmp_path / "peft")


def test_gradients_on_a_bfloat16_base_are_those_of_the_float32_one_to_rounding(stories: Path) -> None:
    gradients = []
    for dtype in ("float32", "bfloat16"):
        backbone = load_language_model(stories, dtype=dtype)
        taught, tokens = teach(backbone), tokens_of(backbone)
        backbone.model(input_ids=tokens, labels=tokens).loss.backward()
        layers = taught.layers().values()
        gradients.append(torch.cat([f.grad.flatten() for layer in layers for f in (layer.down, layer.up)]))
    wide, narrow = gradients
    assert float(torch.nn.functional.cosine_similarity(wide, narrow, dim=0)) > 0.99


def test_probes_of_rows_are_taken_too(tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    teach(backbone)
    layout = language_layout.LanguageLayout(backbone)
    batch = layout.probe([json.dumps({"instruction": "red", "input": "", "output": "blue"})])
    assert np.prod(layout.expected(batch).shape) == int(batch["attention_mask"].sum()) * backbone.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_the_readme_runs_alone_without_everlora(kind: str, tmp_path: Path) -> None:
    backbone = load_language_model(save_language_model("llama", tmp_path / "base"))
    export(teach(backbone, variants=("stable", "plastic")), backbone, tmp_path / "out", kind)
    check = "import sys; assert not any(name.startswith('everlora') for name in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([readme_code(tmp_path / "out"), check])],
        cwd=tmp_path / "out",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
