"""O-LoRA by a callback: frozen earlier adapters beside a new one, and the penalty between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from everlora.callbacks import EverloraCallback
from everlora.callbacks.o_lora import PAST
from everlora.errors import StoreError, UnsupportedError
from tests.callbacks.builders import Watch, base_model, collate, flip_byte, lora_model, rows, same, trained, trainer
from tests.callbacks.builders import logits as logits_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers


def first_task(source: Path | None, folder: Path, **config: Any) -> Any:
    """Write the state after a first task, and return its model."""
    model = lora_model(source, moved=True, seed=1, **config)
    callback = EverloraCallback("o_lora")
    callback.begin(model)
    callback.finish(model)
    callback.save(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    return logits_of(model, collate(rows(3, key="probe")))


@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_the_step_has_the_gradient_of_loss_plus_penalty(source: Path | None, tmp_path: Path, norm: str) -> None:
    first = first_task(source, tmp_path / "one")
    options = {"lambda_1": 0.7, "lambda_2": 0.3, "orth_norm": norm}
    found = []
    for chosen in ({"lambda_1": 0.0, "lambda_2": 0.0}, options):
        watch = Watch()
        callback = EverloraCallback("o_lora", tmp_path / "one", **chosen)
        model = lora_model(source, seed=2, moved=True)
        given = {"callbacks": [callback, watch]}
        values = {"max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer(model, tmp_path, rows(8), extra=given, **values).train()
        assert len(watch.gradients) == 1
        found.append(watch.gradients[0])
    new = {n: p for n, p in lora_model(source, seed=2, moved=True).named_parameters() if p.requires_grad}
    old = {n: p.detach() for n, p in first.named_parameters() if "lora_A" in n}
    overlaps = [old[name] @ new[name].T for name in old]
    sizes = [o.abs().sum() if norm == "l1" else o.square().sum() for o in overlaps]
    penalty = 0.7 * sum(sizes) + 0.3 * sum(p.norm() for p in new.values())  # type: ignore[operator]
    expected = dict(zip(new, torch.autograd.grad(penalty, list(new.values())), strict=True))
    assert expected.keys() == found[0].keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[1][name] - found[0][name], value, rtol=1e-3, atol=1e-5)
        assert value.abs().max() > 1e-3


def test_only_the_new_adapter_is_trained_and_all_take_part(source: Path | None, tmp_path: Path) -> None:
    first = first_task(source, tmp_path / "one")
    model = lora_model(source, seed=2)
    base = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    names = set(trained(model))
    callback = EverloraCallback("o_lora", tmp_path / "one")
    callback.begin(model)
    assert set(trained(model)) == names
    assert model.active_adapters == ["default", PAST]
    torch.testing.assert_close(logits(model), logits(first))  # a new adapter begins at zero
    past = {name: p.clone() for name, p in model.named_parameters() if PAST in name}
    trainer(model, tmp_path, rows(8), extra={"callbacks": [callback]}).train()
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in {**base, **past}.items())
    assert model.active_adapters == ["default", PAST]
    assert not torch.equal(logits(model), logits(first))


def test_the_saved_adapter_is_the_sum_of_all_tasks_for_plain_peft(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", lora_alpha=16)  # another scaling than the second task's
    model = lora_model(source, seed=2, target_modules=["q_proj", "o_proj"])  # and another layer
    callback = EverloraCallback("o_lora", tmp_path / "one")
    trainer(model, tmp_path, rows(8), extra={"callbacks": [callback]}).train()
    callback.save(tmp_path / "two")
    loaded = PeftModel.from_pretrained(base_model(source), tmp_path / "two" / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)  # another order of summation
    shapes = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(loaded).items()}
    layer = "base_model.model.model.layers.0.self_attn."
    assert shapes[f"{layer}q_proj.lora_A.weight"] == (8, 64)
    assert shapes[f"{layer}v_proj.lora_A.weight"] == shapes[f"{layer}o_proj.lora_A.weight"] == (4, 64)
    third = EverloraCallback("o_lora", tmp_path / "two")
    continued = lora_model(source, seed=3)
    third.begin(continued)
    torch.testing.assert_close(logits(continued), logits(model), rtol=1e-4, atol=1e-4)
    third.finish(continued)
    third.save(tmp_path / "three")
    assert third.num_tasks == 3
    assert third._regularizer.record() == {"ranks": [4, 4, 4]}


@pytest.mark.slow
def test_directions_are_kept_apart(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one")

    def overlap(strength: float) -> float:
        callback = EverloraCallback("o_lora", tmp_path / "one", lambda_1=strength)
        model = lora_model(source, seed=2)
        trainer(model, tmp_path, rows(16), num_train_epochs=5, extra={"callbacks": [callback]}).train()
        probe = EverloraCallback("o_lora", tmp_path / "one", lambda_1=1.0)
        probe._regularizer._layers = callback._regularizer._layers  # type: ignore[attr-defined]
        return float(probe.penalty(model).detach())

    assert overlap(0.5) < 0.9 * overlap(0.0)


def test_without_weights_nothing_changes(source: Path | None, tmp_path: Path) -> None:
    plain, held = lora_model(source), lora_model(source)
    trainer(plain, tmp_path, rows(12)).train()
    callback = EverloraCallback("o_lora", lambda_1=0.0)
    trainer(held, tmp_path, rows(12), extra={"callbacks": [callback]}).train()
    assert same(trained(plain), trained(held))


def test_a_second_task_in_the_same_process(source: Path | None, tmp_path: Path) -> None:
    callback = EverloraCallback("o_lora")
    model = lora_model(source)
    trainer(model, tmp_path, rows(8), extra={"callbacks": [callback]}).train()
    before = logits(model)
    with pytest.raises(UnsupportedError, match="count twice"):
        trainer(model, tmp_path, rows(8), extra={"callbacks": [callback]})
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    callback.begin(model)
    assert model.active_adapters == ["second", PAST]
    torch.testing.assert_close(logits(model), before)


def test_what_does_not_fit_is_refused(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one")
    with pytest.raises(UnsupportedError, match="use_dora"):
        EverloraCallback("o_lora").begin(lora_model(source, use_dora=True))
    with pytest.raises(UnsupportedError, match="modules_to_save"):
        EverloraCallback("o_lora").begin(lora_model(source, modules_to_save=["norm"]))
    flip_byte(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(StoreError, match="sha256"):
        EverloraCallback("o_lora", tmp_path / "one")
