"""A small language model with a PEFT adapter, ragged rows of tokens, and trainers that run for seconds."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from everlora.callbacks import ILoraArguments, everlora_trainer
from everlora.methods.keys import keyed_generator

VOCABULARY = 512
Rows = list[dict[str, Any]]


@functools.cache
def _base(source: Path | None) -> Any:
    if source is not None:
        return AutoModelForCausalLM.from_pretrained(source / "models" / "stories260K")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2))


def base_model(source: Path | None) -> Any:
    """A small language model: stories260K below `source`, or one of the same shape with random weights."""
    return copy.deepcopy(_base(source))


def lora_model(source: Path | None, *, seed: int = 0, moved: bool = False, **config: Any) -> PeftModel:
    """The small model with an adapter; `moved` gives the up-projections values, as after training."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base_model(source), LoraConfig(**settings))
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model


def rows(count: int, *, key: str = "rows", shortest: int = 6, longest: int = 20) -> Rows:
    """Rows of random tokens and lengths; the first third of each is a prompt without labels."""
    generator = keyed_generator(key)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "source": "made up"})
    return made


def collate(examples: Rows) -> dict[str, Tensor]:
    """Pad on the right; columns of text are left alone."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples]) for key, value in fill.items()
    }
    batch["attention_mask"] = torch.tensor([[i < len(e["input_ids"]) for i in range(longest)] for e in examples]).long()
    return batch


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    """Arguments of a trainer that says nothing and writes nothing."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "seed": 3,
        **values,
    }


def trainer(
    model: Any,
    folder: Path,
    data: Rows,
    *,
    cls: type[Trainer] = Trainer,
    extra: dict[str, Any] | None = None,
    **values: Any,
) -> Any:
    """Make a trainer; `extra` goes to the class, `values` to its arguments."""
    arguments = TrainingArguments(**settings(folder, **values))
    return cls(model=model, args=arguments, train_dataset=data, data_collator=collate, **(extra or {}))


def trained(model: Any) -> dict[str, Tensor]:
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


class Watch(TrainerCallback):
    """Keeps the gradients just before each optimiser step, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(trained(model))


def ilora(
    model: Any, folder: Path, data: Any, *, extra: dict[str, Any] | None = None, values: Any = None, **own: Any
) -> Any:
    """A trainer with I-LoRA; `own` are its parameters."""
    given = {"ilora": ILoraArguments(**own), **(extra or {})}
    return trainer(model, folder, data, cls=everlora_trainer(Trainer), extra=given, **(values or {}))


def first_task(source: Path | None, folder: Path, **own: Any) -> Any:
    """Learn a first task and write its folder; the stable and the plastic adapter differ."""
    made = ilora(lora_model(source), folder.parent, rows(16, key="first"), **{"ilora_buffer_size": 8, **own})
    made.train()
    made.save_adapters(folder)
    return made


def second_task(source: Path | None, before: Path, *, values: Any = None, **own: Any) -> Any:
    settings = {"ilora_buffer_size": 8, "previous_task_model": before, **own}
    return ilora(lora_model(source, seed=9), before.parent, rows(8, key="second"), values=values, **settings)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def memory_rows(made: Any, step: int, sizes: list[int]) -> list[dict[str, Tensor]]:
    """What a step draws from the memory."""
    made.dual.begin_step([{"input_ids": torch.zeros(n, 1)} for n in sizes], 0, step=step, average_over_processes=True)
    drawn = list(made.dual._queue)
    made.dual._queue.clear()
    return drawn
