"""What the tests of methods on language models share: the small real model, and single steps on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.methods import method_spec
from everlora.methods.base import Batch, Recalled, TaskInfo
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer, TrainingOptions
from everlora.training.passes import Collector

WORDS = (
    "once upon a time there was a little girl who had a red ball and a big dog",
    "the sum of three and four is seven because four and three make seven apples",
    "the bank said on monday that its shares fell and the market rose again",
)
FAST: dict[str, Any] = {"batch_size": 4, "lr": 1e-2, "lr_schedule": "constant", "epochs": 2}


def language_task(task: int, count: int = 8, *, longest: int = 8) -> Examples:
    """Instructions of different lengths in the words of one domain."""
    random = np.random.RandomState(task)
    words = WORDS[task % len(WORDS)].split()
    rows = []
    for _ in range(count):
        prompt, answer = (" ".join(random.choice(words, random.randint(1, longest))) for _ in range(2))
        rows.append(json.dumps({"instruction": prompt, "input": "", "output": answer}))
    return Examples("language", tuple(rows), None, np.arange(count, dtype=np.int64) + 1000 * task)


class LanguageBench:
    """A method on the small model, with the trainer and the data of some tasks."""

    def __init__(
        self, folder: Path, name: str, count: int = 3, *, training: Any = None, data: Any = None, **options: Any
    ) -> None:
        self.backbone = load_backbone(folder, kind="causal_lm", max_length=64)
        spec = method_spec(name)
        self.method: Any = spec.method_class(spec.options(options), self.backbone, seed=1)
        self.trainer = TaskTrainer(self.backbone, self.method, TrainingOptions(**{**FAST, **(training or {})}))
        examples = [language_task(index) for index in range(count)] if data is None else data
        self.data = [TaskData.of(self.backbone, rows, {}) for rows in examples]
        self.infos = [TaskInfo(index, f"task {index}", (), len(rows)) for index, rows in enumerate(self.data)]

    def learn(self, *indices: int) -> list[Any]:
        """Train on tasks in turn."""
        return [self.trainer.learn(self.infos[index], self.data[index]) for index in indices]

    def begin(self, index: int, steps: int = 4) -> None:
        info = TaskInfo(index, f"task {index}", (), len(self.data[index]), steps)
        self.method.begin_task(info, self.collect(index))
        self.backbone.train(True)

    def collect(self, index: int) -> Any:
        return Collector(self.trainer, self.infos[index], self.data[index], None)

    def batch(self, index: int, rows: list[int], *, pack: bool = False) -> Batch:
        return self.trainer.batch(self.data[index], torch.tensor(rows), epoch=0, pack=pack)

    def memory(self, recalled: Recalled) -> Batch:
        inputs = self.trainer.inputs(recalled.encoded, torch.arange(len(recalled.labels)), 0)
        return Batch(inputs, inputs.pop("labels"), tasks=recalled.tasks)

    def factors(self) -> dict[str, Tensor]:
        """Copies of the trained factors."""
        return {
            f"{n}/{i}": f.detach().clone()
            for n, m in self.method.layers().items()
            for i, f in enumerate((m.down, m.up))
        }

    def stable(self) -> dict[str, Tensor]:
        """Copies of the stable factors."""
        pairs = self.method.stable.factors().items()
        return {f"{name}/{i}": f.detach().clone() for name, pair in pairs for i, f in enumerate(pair)}

    def base(self) -> dict[str, Tensor]:
        """Copies of the base weights."""
        names = {"up", "down", "past_up", "past_down", "past_scale", "past_ranks"}
        state = self.backbone.model.state_dict().items()
        return {k: v.clone() for k, v in state if k.rpartition(".")[2] not in names}

    def logits(self, index: int, variant: str | None = None) -> Tensor:
        """Scores of all tokens of a task's rows."""
        self.backbone.eval()
        with torch.no_grad(), self.method.predicting(variant):
            return self.method.logits(self.batch(index, list(range(len(self.data[index])))))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
