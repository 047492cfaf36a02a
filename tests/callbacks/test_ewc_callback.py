"""Elastic weight consolidation by a callback: what reaches the optimiser, what is measured, what is carried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils.data import DataLoader

from everlora.callbacks import EverloraCallback
from everlora.errors import DataError, ModelError, NumericError, OptionError, StoreError
from tests.callbacks.builders import Watch, base_model, collate, flip_byte, lora_model, rows, same, trained, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers


def loader(count: int = 12, key: str = "first") -> DataLoader[Any]:
    return DataLoader(rows(count, key=key), batch_size=4, collate_fn=collate)


def measured(source: Path | None, folder: Path, **options: Any) -> Path:
    """Write the state after a first task whose adapter is `lora_model(moved=True)`."""
    callback = EverloraCallback("ewc", **options)
    callback.finish(lora_model(source, moved=True), loader())
    callback.save(folder)
    return folder


def shifted(source: Path | None) -> Any:
    """The first task's adapter, away from where it ended."""
    model = lora_model(source, moved=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return model


def gradients(model: Any, folder: Path, callback: Any, **values: Any) -> list[dict[str, Tensor]]:
    watch = Watch()
    callbacks = [watch] if callback is None else [callback, watch]
    trainer(model, folder, rows(8), extra={"callbacks": callbacks}, **values).train()
    return watch.gradients


def test_fisher_is_the_mean_square_of_single_examples(source: Path | None) -> None:
    model = lora_model(source, moved=True)
    callback = EverloraCallback("ewc", fisher_samples=5, normalize_fisher=False, seed=1)
    data = rows(5, key="fisher")
    callback.finish(model, DataLoader(data, batch_size=2, collate_fn=collate))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    model.eval()
    for example in data:
        batch = collate([example])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        chosen = targets != -100
        loss = torch.nn.functional.cross_entropy(logits[chosen], targets[chosen])
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] += gradient.square() / 5
    found = callback._regularizer.importance  # type: ignore[attr-defined]
    assert len(found) == len(expected) == 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace(".default", "")], value)


def test_fisher_is_divided_by_its_mean(source: Path | None) -> None:
    callback = EverloraCallback("ewc")
    callback.finish(lora_model(source, moved=True), loader())
    values = torch.cat([f.flatten() for f in callback._regularizer.importance.values()])  # type: ignore[attr-defined]
    assert float(values.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(values.std()) > 0.1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_has_the_gradient_of_loss_plus_penalty(source: Path | None, tmp_path: Path, accumulation: int) -> None:
    folder = measured(source, tmp_path / "state")
    values = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    values["max_grad_norm"] = 0.0
    plain = gradients(shifted(source), tmp_path, None, **values)
    callback = EverloraCallback("ewc", folder, ewc_lambda=7.0, finish_at_end=False)
    held = gradients(shifted(source), tmp_path, callback, **values)
    assert len(plain) == len(held) == 1
    regularizer: Any = callback._regularizer
    model = shifted(source)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "")
            by_hand = 7.0 * regularizer.importance[key] * (parameter.detach() - regularizer.anchor[key])
            torch.testing.assert_close(held[0][name] - plain[0][name], by_hand, rtol=1e-3, atol=1e-6)
            assert by_hand.abs().max() > 1e-4


def test_gradients_are_those_of_the_penalty(source: Path | None, tmp_path: Path) -> None:
    callback = EverloraCallback("ewc", measured(source, tmp_path / "state"))
    model = shifted(source)
    callback.begin(model)
    callback.penalty(model).backward()
    for parameter, gradient in callback._regularizer.gradients(model):
        torch.testing.assert_close(gradient, parameter.grad)


def test_clipping_covers_the_penalty(source: Path | None, tmp_path: Path) -> None:
    folder = measured(source, tmp_path / "state")
    callback = EverloraCallback("ewc", folder, ewc_lambda=1e4, finish_at_end=False)
    found = gradients(shifted(source), tmp_path, callback, max_grad_norm=0.5)
    norm = torch.cat([g.flatten() for g in found[0].values()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_without_announced_steps_the_penalty_is_still_added_once(source: Path | None, tmp_path: Path) -> None:
    callback = EverloraCallback("ewc", measured(source, tmp_path / "state"))
    model = shifted(source)
    callback.begin(model)
    callback.on_pre_optimizer_step(None, None, None, model=model)
    expected = {id(p): g for p, g in callback._regularizer.gradients(model)}
    assert all(torch.equal(p.grad, expected[id(p)]) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("later", [False, True])
def test_lambda_zero_changes_nothing(source: Path | None, tmp_path: Path, later: bool) -> None:
    state = measured(source, tmp_path / "state") if later else None
    plain, held = lora_model(source, moved=True), lora_model(source, moved=True)
    trainer(plain, tmp_path, rows(12), optim="adamw_torch").train()
    callback = EverloraCallback("ewc", state, ewc_lambda=0.0)
    trainer(held, tmp_path, rows(12), optim="adamw_torch", extra={"callbacks": [callback]}).train()
    assert same(trained(plain), trained(held))
    assert not same(trained(plain), trained(lora_model(source, moved=True)))


@pytest.mark.slow
def test_a_strong_penalty_holds_the_adapter(source: Path | None, tmp_path: Path) -> None:
    folder = measured(source, tmp_path / "state")

    def distance(strength: float) -> float:
        """How far the adapter moves along what the first task depends on."""
        model = lora_model(source, moved=True)
        callback = EverloraCallback("ewc", folder, ewc_lambda=strength, finish_at_end=False)
        values = {"num_train_epochs": 3, "learning_rate": 1e-3, "max_grad_norm": 0.0}
        trainer(model, tmp_path, rows(16), extra={"callbacks": [callback]}, **values).train()
        probe = EverloraCallback("ewc", folder, ewc_lambda=2.0)
        return float(probe.penalty(model).detach())

    importance = EverloraCallback("ewc", folder)._regularizer.importance  # type: ignore[attr-defined]
    largest = max(float(value.max()) for value in importance.values())
    assert 0 < distance(1.0 / (1e-3 * largest)) < 0.7 * distance(0.0)  # more would overshoot


def test_measured_at_the_end_and_carried_to_the_next_task(source: Path | None, tmp_path: Path) -> None:
    first = EverloraCallback("ewc", fisher_samples=4)
    model = lora_model(source)
    trainer(model, tmp_path, rows(8), extra={"callbacks": [first]}).train()
    assert model.training
    first.save(tmp_path / "one")
    second = EverloraCallback("ewc", tmp_path / "one", fisher_samples=4, gamma=0.5)
    assert second.num_tasks == 1
    old = {k: v.clone() for k, v in second._regularizer.importance.items()}  # type: ignore[attr-defined]
    trainer(model, tmp_path, rows(8, key="b"), extra={"callbacks": [second]}).train()
    once = {k: v.clone() for k, v in second._regularizer.importance.items()}  # type: ignore[attr-defined]
    second.finish(model, trainer(model, tmp_path, rows(8, key="b")).get_train_dataloader())
    assert second.num_tasks == 2
    assert same(once, second._regularizer.importance)  # type: ignore[attr-defined]
    total = sum(float(v.sum()) for v in once.values()) / sum(v.numel() for v in once.values())
    assert total == pytest.approx(1.5, rel=1e-4)  # gamma times a mean of 1, and 1
    assert all(bool((once[name] >= 0.5 * old[name] - 1e-6).all()) for name in old)


def test_what_does_not_fit_is_refused(source: Path | None, tmp_path: Path) -> None:
    folder = measured(source, tmp_path / "state")
    with pytest.raises(OptionError, match="ewc_lamda"):
        EverloraCallback("ewc", ewc_lamda=1.0)
    with pytest.raises(OptionError, match="greater than or equal to 0"):
        EverloraCallback("ewc", ewc_lambda=-1.0)
    with pytest.raises(OptionError, match="did you mean 'ewc'"):
        EverloraCallback("ewcc")
    with pytest.raises(StoreError, match="one of 'ewc'"):
        EverloraCallback("o-lora", folder)
    with pytest.raises(ModelError, match="get_peft_model"):
        EverloraCallback("ewc").begin(base_model(source))
    with pytest.raises(StoreError, match="shape"):
        EverloraCallback("ewc", folder).begin(lora_model(source, r=2))
    with pytest.raises(StoreError, match="no such weight"):
        EverloraCallback("ewc", folder).begin(lora_model(source, target_modules=["q_proj"]))
    with pytest.raises(StoreError, match="finished task"):
        EverloraCallback("ewc").save(tmp_path / "none")
    with pytest.raises(DataError, match="DataLoader"):
        EverloraCallback("ewc").finish(lora_model(source))
    unlabelled = [{**row, "labels": [-100] * len(row["input_ids"])} for row in rows(2)]
    with pytest.raises(DataError, match="labels"):
        EverloraCallback("ewc").finish(lora_model(source), DataLoader(unlabelled, collate_fn=collate))
    broken = lora_model(source, moved=True)
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        EverloraCallback("ewc").finish(broken, loader(2))
    flip_byte(folder / "fisher.safetensors")
    with pytest.raises(StoreError, match="sha256"):
        EverloraCallback("ewc", folder)


def test_an_adapter_that_does_not_start_from_the_anchor_is_named(
    source: Path | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EverloraCallback("ewc", measured(source, tmp_path / "state"))
    callback.begin(lora_model(source, moved=True))
    assert "does not start" not in caplog.text
    trainer(shifted(source), tmp_path, rows(4), extra={"callbacks": [callback]}).train()
    assert caplog.text.count("does not start where the task before ended") == 1


def test_scaled_losses_are_matched(source: Path | None, tmp_path: Path) -> None:
    """A float16 run divides its gradients by the scale before it steps: the penalty's come out as they are."""
    callback = EverloraCallback("ewc", measured(source, tmp_path / "state"))
    model = shifted(source)
    callback.begin(model)
    expected = {id(p): g for p, g in callback._regularizer.gradients(model)}
    Accelerator(cpu=True)
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    optimizer = AcceleratedOptimizer(plain, device_placement=False, scaler=scaler)
    callback.on_step_begin(None, None, None, model=model, optimizer=optimizer)
    scaler.unscale_(plain)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[id(parameter)])
