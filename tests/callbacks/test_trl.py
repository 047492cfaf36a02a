"""Callback and trainer with TRL's SFTTrainer, which computes its loss without logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, Trainer

from everlora.callbacks import EverloraCallback, ILoraArguments, everlora_trainer
from everlora.errors import UnsupportedError
from tests.callbacks.builders import Watch, base_model, collate, lora_model, rows, same, settings, trained, trainer

trl = pytest.importorskip("trl", reason="trl is not installed; pip install 'everlora[trl]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft of transformers
]

TEXTS = [
    {"prompt": f"Q: what does {name} like? A:", "completion": f" {name} likes the {thing} in the garden."}
    for name, thing in [("Lily", "cat"), ("Tom", "big dog"), ("Anna", "tree"), ("Ben", "old red ball")]
]


def sft(shared: Path, folder: Path, model: Any, *, cls: Any = None, data: Any = None, **given: Any) -> Any:
    """An SFTTrainer on texts, or on rows of tokens that are ready."""
    values = given.pop("values", {})
    values = {"activation_checkpointing": False, "bf16": False, **values}
    if data is not None:
        values |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
        given["data_collator"] = collate
    return (cls or trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**settings(folder, **values)),
        train_dataset=Dataset.from_list(TEXTS * 2 if data is None else data),
        processing_class=AutoTokenizer.from_pretrained(shared / "models" / "stories260K"),
        **given,
    )


def one_gradient(made: Any) -> dict[str, torch.Tensor]:
    watch = Watch()
    made.add_callback(watch)
    made.args.max_grad_norm = 0.0
    made.train()
    return watch.gradients[0]


def test_ewc_adds_its_gradient(shared: Path, tmp_path: Path) -> None:
    first = EverloraCallback("ewc", fisher_samples=4)
    made = sft(shared, tmp_path, lora_model(shared), callbacks=[first])
    made.train()
    first.save(tmp_path / "one")
    found = []
    for strength in (0.0, 5.0):
        callback = EverloraCallback("ewc", tmp_path / "one", ewc_lambda=strength, finish_at_end=False)
        model = lora_model(shared, moved=True)
        found.append(one_gradient(sft(shared, tmp_path, model, callbacks=[callback])))
    parameters = dict(lora_model(shared, moved=True).named_parameters())
    regularizer: Any = callback._regularizer
    for name, value in found[1].items():
        key = name.replace(".default", "")
        by_hand = 5.0 * regularizer.importance[key] * (parameters[name].detach() - regularizer.anchor[key])
        torch.testing.assert_close(value - found[0][name], by_hand, rtol=1e-3, atol=1e-5)


def test_a_first_task_is_the_plain_trainers(shared: Path, tmp_path: Path) -> None:
    plain, held = lora_model(shared), lora_model(shared)
    expected = sft(shared, tmp_path, plain).train().training_loss
    made = sft(shared, tmp_path, held, cls=everlora_trainer(trl.SFTTrainer))
    assert made.train().training_loss == expected
    assert same(trained(plain), trained(held))
    assert made.dual.updates == 2
    assert len(made.dual.memory) == 8


@pytest.mark.parametrize("layers", [(-1,), "all"])
def test_a_step_is_that_of_the_plain_trainers_subclass(shared: Path, tmp_path: Path, layers: Any) -> None:
    """The same rows, memory and formula, by another way to compute the loss."""
    made = trainer(
        lora_model(shared), tmp_path, rows(16), cls=everlora_trainer(Trainer), extra={"ilora": ILoraArguments()}
    )
    made.train()
    made.save_adapters(tmp_path / "one")
    own = ILoraArguments(previous_task_model=tmp_path / "one", consistency_weight=50.0, hidden_state_layers=layers)
    data = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(8, key="second")]
    values = {"gradient_accumulation_steps": 2}
    plain = trainer(lora_model(shared), tmp_path, data, cls=everlora_trainer(Trainer), extra={"ilora": own}, **values)
    cls = everlora_trainer(trl.SFTTrainer)
    other = sft(shared, tmp_path, lora_model(shared), cls=cls, data=data, ilora=own, values=values)
    expected, found = one_gradient(plain), one_gradient(other)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    assert other.dual.figures()["ema_updates"] == 5


def test_a_second_task_continues(shared: Path, tmp_path: Path) -> None:
    cls = everlora_trainer(trl.SFTTrainer)
    first = sft(shared, tmp_path, lora_model(shared), cls=cls, ilora=ILoraArguments(ema_alpha=0.5))
    first.train()
    first.save_adapters(tmp_path / "one")
    own = ILoraArguments(previous_task_model=tmp_path / "one", selective_update=True, min_update_threshold=-9.0)
    values = {"activation_checkpointing": True, "logging_strategy": "steps", "logging_steps": 1}
    second = sft(shared, tmp_path, lora_model(shared, seed=4), cls=cls, ilora=own, values=values)
    second.train()
    assert second.dual.updates == 4
    assert second.state.log_history[-2]["consistency"] > 0
    assert second.state.log_history[-2]["gate_open_rate"] == 1.0
    second.save_adapters(tmp_path / "two")
    batch = collate(rows(2))
    batch.pop("labels")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base_model(shared), tmp_path / "two" / "stable").eval()
        with second.dual.stable.in_place():
            assert torch.equal(loaded(**batch).logits, second.model.eval()(**batch).logits)


def test_packed_rows_are_refused(shared: Path, tmp_path: Path) -> None:
    cls = everlora_trainer(trl.SFTTrainer)
    made = sft(shared, tmp_path, lora_model(shared), cls=cls)
    made.train()
    made.save_adapters(tmp_path / "one")
    own = ILoraArguments(previous_task_model=tmp_path / "one")
    packed = sft(shared, tmp_path, lora_model(shared), cls=cls, ilora=own)
    packed.data_collator = lambda examples: {**collate(rows(4)), "position_ids": torch.zeros(4, 20)}
    with pytest.raises(UnsupportedError, match="position_ids"):
        packed.train()
