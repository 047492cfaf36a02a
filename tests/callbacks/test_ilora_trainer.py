"""I-LoRA in a trainer: what each step computes, what the stable adapter becomes, and what the next task gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from everlora.lowrank import retention
from tests.callbacks.builders import (
    Watch,
    base_model,
    collate,
    first_task,
    ilora,
    logits,
    lora_model,
    memory_rows,
    rows,
    same,
    second_task,
    trained,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers


def one_gradient(made: Any) -> dict[str, Tensor]:
    """Gradients of the first optimiser step, not clipped."""
    watch = Watch()
    made.add_callback(watch)
    made.args.max_grad_norm = 0.0
    made.train()
    return watch.gradients[0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("warmup", [True, False])
def test_the_stable_adapter_is_the_moving_average_of_the_plastic_one(
    source: Path | None, tmp_path: Path, warmup: bool, accumulation: int
) -> None:
    watch = Watch()
    model = lora_model(source, moved=True)
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    made = ilora(
        model, tmp_path, rows(12), extra={"callbacks": [watch]}, values=values, ema_alpha=0.6, ema_warmup=warmup
    )
    expected = {name: p.double() for name, p in trained(model).items()}
    start = {name: p.clone() for name, p in made.dual.stable.parameters.items()}
    made.train()
    for k, weights in enumerate(watch.weights):
        kept = retention(k, 0.6, warmup)
        expected = {name: kept * expected[name] + (1 - kept) * weights[name].double() for name in expected}
    stable = made.dual.stable.parameters
    assert made.dual.updates == len(watch.weights) == made.state.global_step == 6 // accumulation
    for name, value in expected.items():
        found = stable[name.replace(".default", "")]
        torch.testing.assert_close(found.double(), value, rtol=0, atol=1e-6)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert not torch.equal(found, weights[name])
    assert not same(start, {name: p.detach() for name, p in stable.items()})
    optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert optimised.isdisjoint({id(p) for p in stable.values()})


@pytest.mark.parametrize("own", [{"consistency_weight": 0.0, "ilora_buffer_size": 0}, {}, {"use_ilora": False}])
def test_a_first_task_is_the_plain_trainers(source: Path | None, tmp_path: Path, own: dict[str, Any]) -> None:
    plain, held = lora_model(source, lora_dropout=0.2), lora_model(source, lora_dropout=0.2)
    expected = trainer(plain, tmp_path, rows(12), optim="adamw_torch").train().training_loss
    made = ilora(held, tmp_path, rows(12), values={"optim": "adamw_torch"}, **own)
    assert made.train().training_loss == expected
    assert same(trained(plain), trained(held))
    assert not same(trained(plain), trained(lora_model(source, lora_dropout=0.2)))


@pytest.mark.parametrize(("mode", "layers"), [("mse", (-1,)), ("one_sided", (-1, 2)), ("mse", "all")])
def test_the_step_has_the_gradient_of_the_formula(source: Path | None, tmp_path: Path, mode: str, layers: Any) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    own = {"consistency_weight": 3.0, "hidden_state_layers": layers, "consistency_mode": mode}
    made = second_task(source, tmp_path / "one", values={"per_device_train_batch_size": 8}, **own)
    (memory,) = memory_rows(made, 0, [8])
    model = made.model
    current = collate([rows(8, key="second")[i] for i in range(8)])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with made.dual.stable.in_place(), torch.no_grad():
        target = model.eval()(**{**memory, "labels": None}, output_hidden_states=True).hidden_states
    outputs = [model(**{**batch, "labels": None}, output_hidden_states=True) for batch in (current, memory)]
    losses, count = 0.0, 0
    for output, batch in zip(outputs, (current, memory), strict=True):
        labels = batch["labels"][:, 1:]
        losses = losses + torch.nn.functional.cross_entropy(
            output.logits[:, :-1].reshape(-1, 512), labels.reshape(-1), reduction="sum"
        )
        count += int((labels != -100).sum())
    mask = memory["attention_mask"].bool()
    chosen = range(6) if layers == "all" else [layer % 6 for layer in layers]
    gaps = [target[layer][mask] - outputs[1].hidden_states[layer][mask] for layer in chosen]
    squares = [(gap.relu() if mode == "one_sided" else gap).square().sum() for gap in gaps]
    consistency = sum(squares) / (len(squares) * int(mask.sum()) * 64)
    assert float(consistency.detach()) > 0
    total = losses / count + 3.0 * consistency
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    found = one_gradient(made)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_accumulated_batches_make_the_gradient_of_one(source: Path | None, tmp_path: Path) -> None:
    """Ragged rows: a mean of the batches' means would differ. All memory rows are drawn either way."""
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        made = second_task(source, tmp_path / "one", values=values, consistency_weight=3.0)
        every = collate(made.dual.memory._buffer and rows(8, key="fixed"))
        made.dual.memory.draw = (
            lambda count, *, keys, rank, world, rows=every: {  # type: ignore[method-assign]
                name: value[keys[-1] * count : (keys[-1] + 1) * count] for name, value in rows.items()
            }
        )
        found.append(one_gradient(made))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_consistency_is_on_memory_rows_alone(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    found = []
    for key in ("second", "other"):
        made = second_task(source, tmp_path / "one", consistency_weight=1.0)
        model, dual = made.model, made.dual
        model.train()
        current = collate(rows(4, key=key))
        dual.begin_step([current], 0, step=0, average_over_processes=True)
        batch = dual.prepare(current, dual.next_rows())
        with dual.hidden.recording():
            model(**batch)
        (states,) = dual.hidden.states
        value = dual.consistency(batch["labels"], scale=1.0)
        (gradient,) = torch.autograd.grad(value, states)
        assert not gradient[:4].any()
        assert gradient[4:].any()
        found.append(float(value.detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # other padding, other rounding
    assert found[0] > 0


def test_consistency_is_zero_where_both_adapters_are_the_same(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.0, ema_warmup=False)
    made = second_task(source, tmp_path / "one")
    made.model.train()
    current = collate(rows(4))
    made.dual.begin_step([current], 0, step=0, average_over_processes=True)
    batch = made.dual.prepare(current, made.dual.next_rows())
    with made.dual.hidden.recording():
        made.model(**batch)
    assert float(made.dual.consistency(batch["labels"], scale=1.0).detach()) < 1e-10


def test_gradients_do_not_depend_on_checkpointing(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    found = []
    for checkpointing in (False, True):
        values = {
            "activation_checkpointing": checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        }
        made = second_task(source, tmp_path / "one", values=values, consistency_weight=3.0, hidden_state_layers="all")
        found.append(one_gradient(made))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_model_is_as_before_after_a_flip_that_raises(source: Path | None, tmp_path: Path) -> None:
    made = ilora(lora_model(source, moved=True, lora_dropout=0.3), tmp_path, rows(4))
    model, stable = made.model.train(), made.dual.stable
    before = dict(model.named_parameters())
    grads = {name: p.requires_grad for name, p in before.items()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        for parameter in stable.parameters.values():
            parameter.zero_()
    with pytest.raises(RuntimeError, match="on purpose"), stable.in_place():
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(logits(model, collate(rows(2))), logits(base_model(source), collate(rows(2))))
        model.train()
        raise RuntimeError("on purpose")
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert {name: p.requires_grad for name, p in after.items()} == grads
    assert [m.training for m in model.modules()] == modes


def test_evaluation_takes_the_chosen_adapter(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.99)
    losses = {}
    for name in ("stable", "plastic"):
        made = second_task(source, tmp_path / "one", inference_adapter=name)
        losses[name] = made.evaluate(rows(8, key="first"))["eval_loss"]
        model = PeftModel.from_pretrained(base_model(source), tmp_path / "one" / name)
        plain = trainer(model, tmp_path, rows(1)).evaluate(rows(8, key="first"))["eval_loss"]
        assert losses[name] == plain
    assert losses["stable"] != losses["plastic"]


@pytest.mark.parametrize(("threshold", "updates"), [(1e9, 1), (-1e9, 4)])
def test_the_gate_of_selective_update(source: Path | None, tmp_path: Path, threshold: float, updates: int) -> None:
    own = {"selective_update": True, "min_update_threshold": threshold}
    made = ilora(lora_model(source), tmp_path, rows(16), **own)
    made.train()
    assert made.dual.updates == updates
    model = lora_model(source)
    trainer(model, tmp_path, rows(16)).train()
    for name, value in trained(model).items():  # the gate looks at the plastic adapter, it does not change it
        torch.testing.assert_close(trained(made.model)[name], value, rtol=1e-5, atol=1e-7)


def test_the_gate_compares_the_adapters(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.99)
    made = second_task(source, tmp_path / "one", selective_update=True)
    current = collate(rows(4))
    made.model.train()
    made.dual.begin_step([current], 0, step=0, average_over_processes=True)
    batch = made.dual.prepare(current, made.dual.next_rows())
    with made.dual.hidden.recording():
        made.model(**batch)
    made.dual.consistency(batch["labels"], scale=1.0)
    count = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        expected = [float(made.model(**batch).loss) * count]
        with made.dual.stable.in_place():
            expected.append(float(made.model(**batch).loss) * count)
    assert made.dual._gate.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[1]


def test_logs_tell_the_methods_figures(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    made = second_task(source, tmp_path / "one", values={"logging_strategy": "steps", "logging_steps": 1})
    made.train()
    first = made.state.log_history[0]
    assert first["ema_updates"] == 5
    assert first["consistency"] > 0
    assert first["ema_retention"] == retention(4, 0.999, True)


def test_the_horizon_sets_the_retention_and_a_slow_one_is_named(
    source: Path | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = ilora(lora_model(source), tmp_path, rows(24), ema_horizon=0.5)
    made.train()
    assert made.dual.ema_alpha == pytest.approx(1 - 1 / (0.5 * 6))
    assert "stable adapter will still be" not in caplog.text
    ilora(lora_model(source), tmp_path, rows(8), ema_warmup=False).train()
    assert "the stable adapter will still be 100 %" in caplog.text
