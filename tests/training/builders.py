"""What the tests of the training loop share: trainers on tiny models, and what their methods see of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.methods import method_spec
from everlora.methods.base import Batch, Recalled, TaskInfo
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer, TrainingOptions
from tests.backbones.language_builders import byte_tokenizer
from tests.toy import toy_images, toy_texts

WORDS = "once upon a time there was a little girl who had a red ball and a big dog".split()


def language_rows(count: int = 12, *, seed: int = 0, plain: bool = True) -> Examples:
    """Instructions of very different lengths, and some plain texts that become blocks."""
    random = np.random.RandomState(seed)
    rows: list[dict[str, str]] = []
    for index in range(count):
        words = [WORDS[random.randint(len(WORDS))] for _ in range(random.randint(2, 30))]
        cut = random.randint(1, len(words))
        if plain and index % 4 == 3:
            rows.append({"text": " ".join(words)})
        else:
            rows.append({"instruction": " ".join(words[:cut]), "input": "", "output": " ".join(words[cut:]) or "dog"})
    inputs = tuple(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows)
    return Examples("language", inputs, None, np.arange(count, dtype=np.int64) + 1000 * seed)


def save_language_model(folder: Path) -> Path:
    """A Llama of two small blocks that reads bytes."""
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Bench:
    """A method on a tiny model, with the gradients and batches of each step."""

    def __init__(self, folder: Path, kind: str, name: str = "sequential", *, training: Any = None, **options: Any):
        language = kind == "language"
        self.backbone = load_backbone(folder, **({"kind": "causal_lm", "max_length": 160} if language else {}))
        spec = method_spec(name)
        self.method: Any = spec.method_class(spec.options({"rank": 2, **options}), self.backbone, seed=1)
        self.trainer = self.with_options(**(training or {}))
        make = {"language": language_rows, "image": lambda: toy_images("ab"), "text": lambda: toy_texts("ab")}[kind]
        self.data = TaskData.of(self.backbone, make(), {"a": 0, "b": 1})
        self.task = TaskInfo(0, "first", () if language else (0, 1), len(self.data))
        self.gradients: list[list[Tensor]] = []
        self.batches: list[Batch] = []
        self.events: list[str] = []
        self._record()

    def with_options(self, **training: Any) -> TaskTrainer:
        options = {"batch_size": 8, "epochs": 1, "lr": 1e-2, "augment": "none", **training}
        return TaskTrainer(self.backbone, self.method, TrainingOptions(**options))

    def recall(self, count: int) -> None:
        """Let the method recall the first rows of the data at each step."""
        rows = torch.arange(count)
        labels = torch.zeros(count, dtype=torch.long)
        kept = Recalled(self.data.encoded.select(rows), labels, torch.zeros(count, dtype=torch.long))
        self.method.recall = lambda count, generator: kept

    def learn(self, validation: TaskData | None = None) -> Any:
        return self.trainer.learn(self.task, self.data, validation)

    def _record(self) -> None:
        loss, after = self.method.loss, self.method.after_backward

        def recorded(batch: Batch) -> Any:
            self.batches.append(batch)
            self.events.append("loss")
            return loss(batch)

        def look() -> None:
            after()
            parameters = [p for group in self.method.parameters().values() for p in group]
            self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])

        self.method.loss, self.method.after_backward = recorded, look
        self.method.before_step = self._event(self.method.before_step, "before_step")
        self.method.after_step = self._event(self.method.after_step, "after_step")

    def _event(self, hook: Callable[..., None], name: str) -> Callable[..., None]:
        def noted(*args: Any) -> None:
            self.events.append(name)
            hook(*args)

        return noted


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest norm of a difference of two lists of tensors, relative to all of the first."""
    one, other = (torch.cat([tensor.double().reshape(-1) for tensor in tensors]) for tensors in (first, second))
    return float((one - other).norm() / one.norm())
