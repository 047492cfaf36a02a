"""I-LoRA in a trainer: the folders it writes and continues from, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import PeftModel
from transformers import Trainer

from everlora.callbacks import everlora_trainer
from everlora.errors import EverloraError, ModelError, OptionError, StoreError, UnsupportedError
from tests.callbacks.builders import (
    base_model,
    collate,
    first_task,
    flip_byte,
    ilora,
    logits,
    lora_model,
    memory_rows,
    record,
    rows,
    same,
    second_task,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers


def test_saved_folders_load_with_plain_peft(source: Path | None, tmp_path: Path) -> None:
    made = first_task(source, tmp_path / "one", ema_alpha=0.9)
    batch = collate(rows(3, key="probe"))
    plastic = logits(made.model, batch)
    with made.dual.stable.in_place():
        stable = logits(made.model, batch)
    assert not torch.equal(stable, plastic)
    for name, expected in (("stable", stable), ("plastic", plastic)):
        loaded = PeftModel.from_pretrained(base_model(source), tmp_path / "one" / name)
        assert torch.equal(logits(loaded, batch), expected)
        assert sorted(p.name for p in (tmp_path / "one" / name).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert record(tmp_path / "one" / name / "adapter_config.json")["modules_to_save"] is None
    assert sorted(p.name for p in (tmp_path / "one" / "state").iterdir()) == ["buffer.safetensors", "ilora.json"]


def test_a_second_task_continues(source: Path | None, tmp_path: Path) -> None:
    first = first_task(source, tmp_path / "one", ema_alpha=0.9, current_task_id="news")
    second = second_task(source, tmp_path / "one", ema_alpha=0.9, prev_task_id="news", current_task_id="maths")
    own, other = first.dual, second.dual
    assert (other.updates, other.history, other.task_id) == (4, ["news"], "maths")
    assert same(dict(own.stable.parameters), dict(other.stable.parameters))
    assert same(trained(first.model), trained(second.model))
    assert len(other.memory) == 8
    assert same(own.memory.state(), other.memory.state())
    kept = {tuple(row["input_ids"]) for row in rows(16, key="first")}
    (drawn,) = memory_rows(second, 0, [4])
    for ids, mask in zip(drawn["input_ids"], drawn["attention_mask"], strict=True):
        assert tuple(ids[mask.bool()].tolist()) in kept
    before = {name: p.detach().clone() for name, p in other.stable.parameters.items()}
    second.train()
    assert other.updates == 6
    assert not same(before, {name: p.detach() for name, p in other.stable.parameters.items()})
    assert (other.memory.num_seen, len(other.memory)) == (24, 8)
    assert set(other.memory.state()["tasks"].tolist()) == {0, 1}
    second.save_adapters(tmp_path / "two")
    assert record(tmp_path / "two" / "state" / "ilora.json")["history"] == ["news", "maths"]
    with pytest.raises(UnsupportedError, match="new trainer for a new task"):
        second.train()


def test_kept_examples_carry_their_labels(source: Path | None, tmp_path: Path) -> None:
    made = ilora(lora_model(source), tmp_path, rows(6), ilora_buffer_size=6)
    made.train()
    expected = {tuple(row["input_ids"]): row["labels"] for row in rows(6)}
    (drawn,) = memory_rows(made, 0, [6])
    for ids, labels, mask in zip(drawn["input_ids"], drawn["labels"], drawn["attention_mask"], strict=True):
        assert labels[mask.bool()].tolist() == expected.pop(tuple(ids[mask.bool()].tolist()))
        assert (labels[~mask.bool()] == -100).all()
    assert not expected
    assert made.dual.memory.state()["rows/token_ids"].dtype == torch.uint16


def test_resumed_within_a_task_equals_uninterrupted(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", ema_alpha=0.9)
    values = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}

    def made() -> Any:
        settings = {"ilora_buffer_size": 8, "previous_task_model": tmp_path / "one"}
        return ilora(lora_model(source, seed=9), tmp_path / "run", rows(8, key="second"), values=values, **settings)

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.dual.updates == whole.dual.updates == 8
    assert same(trained(whole.model), trained(again.model))
    assert same(dict(whole.dual.stable.parameters), dict(again.dual.stable.parameters))
    assert same(whole.dual.memory.state(), again.dual.memory.state())
    flip_byte(tmp_path / "run" / "checkpoint-2" / "everlora" / "stable.safetensors")
    with pytest.raises(StoreError, match="sha256"):
        made().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.slow
def test_where_the_stable_adapter_is_kept(source: Path | None, tmp_path: Path) -> None:
    hidden = first_task(source, tmp_path / "one", save_ema_adapter=False)
    assert not (tmp_path / "one" / "stable").exists()
    continued = second_task(source, tmp_path / "one")
    assert same(dict(hidden.dual.stable.parameters), dict(continued.dual.stable.parameters))
    apart = first_task(source, tmp_path / "two", ema_adapter_path="slow")
    assert (tmp_path / "slow" / "adapter_model.safetensors").is_file()
    continued = second_task(source, tmp_path / "two", ema_adapter_path="slow")
    assert same(dict(apart.dual.stable.parameters), dict(continued.dual.stable.parameters))
    continued.train()
    continued.save_adapters(tmp_path / "three")  # "slow" holds that of the later task now
    for path in ("slow", None):
        again = second_task(source, tmp_path / "two", ema_adapter_path=path)
        assert same(dict(apart.dual.stable.parameters), dict(again.dual.stable.parameters))
    hidden_file = next((tmp_path / "one").rglob("stable*.safetensors"))
    hidden_file.write_bytes(hidden_file.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoreError):
        second_task(source, tmp_path / "one")


def test_a_plain_adapter_starts_both(source: Path | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = lora_model(source, moved=True)
    model.save_pretrained(tmp_path / "plain")
    made = second_task(source, tmp_path / "plain")
    assert same(trained(model), trained(made.model))
    assert "both adapters start from it" in caplog.text
    assert made.dual.updates == len(made.dual.memory) == 0
    for name, value in trained(model).items():
        assert torch.equal(made.dual.stable.parameters[name.replace(".default", "")], value)


def test_folders_that_do_not_fit_are_refused(source: Path | None, tmp_path: Path) -> None:
    first_task(source, tmp_path / "one", current_task_id="news")
    with pytest.raises(StoreError, match="expected the task 'maths', found 'news'"):
        second_task(source, tmp_path / "one", prev_task_id="maths")
    with pytest.raises(OptionError, match="new current_task_id"):
        second_task(source, tmp_path / "one", current_task_id="news")
    with pytest.raises(OptionError, match="at least 8"):
        second_task(source, tmp_path / "one", ilora_buffer_size=4)
    settings = {"previous_task_model": tmp_path / "one", "ilora_buffer_size": 8}
    for config, message in (
        ({"r": 2}, "r=2"),
        ({"lora_alpha": 2}, "lora_alpha=2"),
        ({"target_modules": ["q_proj"]}, "targ"),
    ):
        with pytest.raises(StoreError, match=message):
            ilora(lora_model(source, **config), tmp_path, rows(4), **settings)
    with pytest.raises(StoreError, match="missing"):
        second_task(source, tmp_path / "nothing")
    with pytest.raises(StoreError, match="new or empty folder"):
        first_task(source, tmp_path / "one")
    for name in ("plastic/adapter_model.safetensors", "state/buffer.safetensors", "stable/adapter_model.safetensors"):
        flip_byte(tmp_path / "one" / name)
        with pytest.raises(StoreError, match="sha256"):
            second_task(source, tmp_path / "one")
        flip_byte(tmp_path / "one" / name)
    second_task(source, tmp_path / "one")


REFUSED: list[tuple[type[EverloraError], str, dict[str, Any], dict[str, Any]]] = [
    (UnsupportedError, "modules_to_save", {"modules_to_save": ["norm"]}, {}),
    (UnsupportedError, "bias", {"bias": "all"}, {}),
    (OptionError, "from -6 to 5", {}, {"hidden_state_layers": (6,)}),
    (OptionError, "ema_alpha", {}, {"ema_alpha": 1.5}),
    (OptionError, "previous_task_model along with", {}, {"prev_task_id": "a"}),
]


@pytest.mark.parametrize(("error", "message", "config", "own"), REFUSED)
def test_unsuitable_settings_are_refused(
    source: Path | None, tmp_path: Path, error: type[EverloraError], message: str, config: Any, own: Any
) -> None:
    with pytest.raises(error, match=message):
        ilora(lora_model(source, **config), tmp_path, rows(4), **own)


def test_unsuitable_trainers_and_models_are_refused(source: Path | None, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    with pytest.raises(UnsupportedError, match="load_best_model_at_end"):
        ilora(lora_model(source), tmp_path, rows(4), values=best, extra={"eval_dataset": rows(4)})
    with pytest.raises(ModelError, match="get_peft_model"):
        ilora(base_model(source), tmp_path, rows(4))
    with pytest.raises(OptionError, match="subclass of"):
        everlora_trainer(dict)  # type: ignore[arg-type]
    assert everlora_trainer(Trainer) is everlora_trainer(Trainer)
    tied = ilora(lora_model(source), tmp_path, rows(4))
    with pytest.raises(StoreError, match="call train"):
        tied.save_adapters(tmp_path / "early")


def test_data_whose_examples_cannot_be_kept_is_refused_before_the_first_step(
    source: Path | None, tmp_path: Path
) -> None:
    def stream() -> Iterator[dict[str, list[int]]]:
        yield from rows(4)

    streamed = ilora(lora_model(source), tmp_path, IterableDataset.from_generator(stream), values={"max_steps": 2})
    packed = ilora(lora_model(source), tmp_path, rows(4))
    packed.data_collator = lambda examples: {**collate(examples), "position_ids": torch.zeros(len(examples), 20)}
    for made, message in ((streamed, "found a stream"), (packed, "position_ids")):
        with pytest.raises(UnsupportedError, match=message):
            made.train()
        assert made.state.global_step == 0
    without = ilora(
        lora_model(source),
        tmp_path,
        IterableDataset.from_generator(stream),
        values={"max_steps": 2},
        ilora_buffer_size=0,
    )
    without.train()


def test_adapters_on_tied_embeddings_are_refused(source: Path | None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = lora_model(source, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UnsupportedError, match="tied"):
        ilora(model, tmp_path, rows(4))
