"""A learner that goes on from an adapter of PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from everlora import Learner
from everlora.adapters import read_adapter
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import EverloraError, OptionError, ShapeError, StoreError, TargetError, UnsupportedError
from everlora.methods.sd_lora import SDLoRA
from tests.methods.sd_lora_builders import distance, weights
from tests.toy import tiny_model, toy_learner, toy_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def _adapter(model: Path, folder: Path, *, kind: str = "AutoModel", **options: Any) -> peft.PeftModel:
    """An adapter as users have them, with `lora_B` away from zero."""
    settings = {"r": 3, "lora_alpha": 8, "target_modules": ["query", "value"], **options}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(11)
        base = getattr(transformers, kind).from_pretrained(model, dtype=torch.float32)
        made = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(folder)
    return made


def _batch(learner: Learner, count: int = 4) -> dict[str, Tensor]:
    backbone = learner.backbone
    encoded = backbone.encode(list(toy_tasks("text", 1)[0].inputs[:count]))
    return backbone.collate(encoded, list(range(count)))


def _features(learner: Learner) -> Tensor:
    with torch.no_grad():
        return learner.backbone.features(_batch(learner))


def _method(learner: Learner) -> SDLoRA:
    assert isinstance(learner.method, SDLoRA)
    return learner.method


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.value": 2}, "alpha_pattern": {r"layer\.1\..*value": 5}},
        {"target_modules": ["query"]},
    ],
    ids=["plain", "rslora", "patterns", "queries"],
)
def test_a_learner_starts_where_the_adapter_is(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    made = _adapter(model, tmp_path / "adapter", **options)
    learner = toy_learner(tmp_path / "learner", model, "sd_lora", start_from=str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = made(**_batch(learner)).last_hidden_state
        plain = made.get_base_model()
        found = learner.model(**_batch(learner)).last_hidden_state
        with made.disable_adapter():
            assert (plain(**_batch(learner)).last_hidden_state - expected).abs().max() > 0.01, "the adapter matters"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    sealed = _method(learner).past.sealed
    live = sealed.norms > 0
    assert bool(live.any()) and bool(live.all()) == ("target_modules" not in options)
    torch.testing.assert_close(sealed.delta[live], sealed.norms[live] - 1.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"preset": "paper"}, {"scope": "module", "kd": True}, {"max_rank": 4, "max_compress_error": 1.0}],
    ids=str,
)
def test_the_function_is_kept_and_the_adapter_lives_on_in_the_learner(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    _adapter(model, tmp_path / "adapter")
    learner = toy_learner(tmp_path / "learner", model, "sd_lora", start_from=str(tmp_path / "adapter"), **options)
    method, before = _method(learner), _features(learner)
    tasks = toy_tasks("text", 2)
    if "max_rank" not in options:
        fresh = Learner.open(tmp_path / "learner")
        torch.testing.assert_close(_features(fresh), before)
        state = _method(fresh).past
        state.begin(0, 2)
        for layer in fresh.method.layers().values():
            layer.start_block(2)
        values = state.attach_magnitudes(current=method.options.current or "raw", soft_eps=1.0)
        assert values.shape[-1] == 2
        torch.testing.assert_close(_features(fresh), before, rtol=1e-5, atol=1e-5)
    learner.learn(tasks[0], name="one")
    then = weights(_method(learner))
    if "max_rank" not in options:
        alpha = _method(learner).past.sealed.alpha[:, 0]
        assert bool((alpha != 1.0).all()), "the adapter's magnitude is trained with the others"
        adopted = {name: layer.blocks()[0] for name, layer in learner.method.layers().items()}
        for name, (down, up) in read_adapter(tmp_path / "adapter").items():
            assert torch.equal(adopted[name].down, down) and torch.equal(adopted[name].up, up)
    shutil.rmtree(tmp_path / "adapter")
    again = Learner.open(tmp_path / "learner")
    assert distance(weights(_method(again)), then) < 1e-6
    again.learn(tasks[1], name="two")
    third = Learner.open(tmp_path / "learner")
    assert distance(weights(_method(third)), weights(_method(again))) < 1e-6
    if _method(third).past.earliest_exact == 0:
        with _method(third).model_at(0):
            assert distance(weights(_method(third)), then) < 1e-6
    else:
        assert "max_rank" in options
    names = third.method.panels()["magnitude"]
    assert next(iter(names)).startswith("adapter")
    for layout in ("merged", "peft"):
        assert third.export(tmp_path / layout, layout).max_difference < 1e-5
    third.rollback(1)
    assert distance(weights(_method(third)), then) < 1e-6
    with pytest.raises(StoreError, match="expected a PEFT adapter"):
        third.rollback(0)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_one_learner_exports_another_starts_from(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path / "model")
    first = toy_learner(tmp_path / "first", model, "sd_lora")
    for index, task in enumerate(toy_tasks("text", 2)):
        first.learn(task, name=str(index))
    first.export(tmp_path / "adapter", "peft")
    second = toy_learner(tmp_path / "second", model, "sd_lora", start_from=str(tmp_path / "adapter"))
    torch.testing.assert_close(_features(second), _features(first), rtol=1e-5, atol=1e-5)
    assert distance(weights(_method(second)), weights(_method(first))) < 1e-6
    task = toy_tasks("text", 1)[0]
    second.learn(task, name="more")
    assert Learner.open(tmp_path / "second").predict(list(task.inputs[:3])) is not None
    second.export(tmp_path / "again", "peft")
    ranks = {name: len(down) for name, (down, _) in read_adapter(tmp_path / "again").items()}
    before = {name: len(down) for name, (down, _) in read_adapter(tmp_path / "adapter").items()}
    assert ranks == {name: rank + (2 if kind == "bert" else 4) for name, rank in before.items()}


def test_an_adapter_of_a_classifier_is_taken_without_its_head(model: Path, tmp_path: Path) -> None:
    _adapter(model, tmp_path / "adapter", kind="BertForSequenceClassification", task_type="SEQ_CLS")
    learner = toy_learner(tmp_path / "learner", model, "sd_lora", start_from=str(tmp_path / "adapter"))
    assert set(read_adapter(tmp_path / "adapter")) == {f"bert.{name}" for name in learner.method.layers()}
    assert all(layer.total_rank == 3 for layer in learner.method.layers().values())


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora=True"),
        ({"bias": "all"}, UnsupportedError, "bias='all'"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type='IA3'"),
        ({"lora_alpha": "much"}, StoreError, "lora_alpha of layer"),
        ({"alpha_pattern": {"(": 1}}, StoreError, "lora_alpha of layer"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(
    changes: dict[str, Any], error: type[EverloraError], words: str, model: Path, tmp_path: Path
) -> None:
    _adapter(model, tmp_path / "adapter")
    _edit(tmp_path / "adapter", **changes)
    with pytest.raises(error, match=words):
        read_adapter(tmp_path / "adapter")


def test_what_does_not_fit_is_refused_before_a_directory_is_made(model: Path, tmp_path: Path) -> None:
    _adapter(model, tmp_path / "adapter", target_modules=["query", "key"])
    start = {"start_from": str(tmp_path / "adapter")}
    with pytest.raises(TargetError, match=r"layers query, value, found one that changes .*key"):
        toy_learner(tmp_path / "learner", model, "sd_lora", **start)
    with pytest.raises(UnsupportedError, match="InfLoRA cannot start from an adapter"):
        toy_learner(tmp_path / "learner", model, "inflora", **start)
    with pytest.raises(TargetError, match="which the model has not"):
        toy_learner(tmp_path / "learner", tiny_model("vit", tmp_path / "vit"), "sd_lora", **start)
    with pytest.raises(StoreError, match="expected a PEFT adapter"):
        toy_learner(tmp_path / "learner", model, "sd_lora", start_from=str(tmp_path / "nothing"))
    assert not (tmp_path / "learner").exists()
    learner = toy_learner(tmp_path / "learner", model, "sd_lora", targets=["query", "key"], **start)
    method = _method(learner)
    name = next(iter(method.layers()))
    with pytest.raises(OptionError, match="only once"):
        method.adopt({name: (torch.zeros(1, 16), torch.zeros(16, 1))})
    other = _method(toy_learner(tmp_path / "other", model, "sd_lora"))
    name = next(iter(other.layers()))
    with pytest.raises(ShapeError, match=f"layer '{name}'"):
        other.adopt({name: (torch.zeros(1, 5), torch.zeros(16, 1))})
    _edit(tmp_path / "adapter", lora_alpha=9)
    with pytest.raises(StoreError, match="found another"):
        Learner.open(tmp_path / "learner")
