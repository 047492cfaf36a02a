"""What the tests of methods with one fine-tuned encoder share: tiny models, a linear encoder, passes over rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.backbones.inputs import EncodedImages
from everlora.methods import method_spec
from everlora.methods.base import Batch, Method, TaskInfo
from everlora.streams import concatenate
from everlora.training import TaskData, TaskTrainer, TrainingOptions
from everlora.training.passes import Collector
from tests.methods.conv_builders import save_resnet
from tests.toy import FAST, tiny_model, toy_learner, toy_tasks

KINDS = ("resnet", "vit", "bert")


def save_models(folder: Path) -> dict[str, Path]:
    """Tiny models: a residual network, a vision transformer and a text encoder."""
    for kind in KINDS:
        (folder / kind).mkdir()
    models = {kind: tiny_model(kind, folder / kind) for kind in ("vit", "bert")}
    return {**models, "resnet": save_resnet(folder / "resnet")}


def tasks(kind: str, count: int = 3) -> list[Any]:
    return toy_tasks("text" if kind == "bert" else "image", count)


def assert_goes_on_after_reopening(folder: Path, model: Path, kind: str, name: str, **options: Any) -> None:
    """A learner that is closed and opened between tasks predicts and learns as one that is not."""
    whole = toy_learner(folder / "whole", model, name, epochs=2, **options)
    for task in tasks(kind):
        whole.learn(task)
    parts = toy_learner(folder / "parts", model, name, epochs=2, **options)
    rows = concatenate(tasks(kind))
    for index, task in enumerate(tasks(kind)):
        if index:
            before = parts.predict(rows)
            parts = Learner.open(folder / "parts")
            again = parts.predict(rows)
            assert [a.label for a in before] == [b.label for b in again]
            assert np.allclose([a.score for a in before], [b.score for b in again], atol=1e-6)
        parts.learn(task)
        torch.manual_seed(index)  # whatever ran before must not matter
    assert parts.digest == whole.digest


class Bench:
    """A method on a tiny model, with the trainer and the data of some tasks, for looking at single steps."""

    def __init__(self, model: Path, kind: str, name: str, count: int = 2, *, training: Any = None, **options: Any):
        self.backbone = load_backbone(model)
        spec = method_spec(name)
        self.method: Any = spec.method_class(spec.options(options), self.backbone, seed=1)
        self.trainer = TaskTrainer(
            self.backbone, self.method, TrainingOptions(**{**FAST, "dropout": False, **(training or {})})
        )
        self.data: list[TaskData] = []
        self.infos: list[TaskInfo] = []
        for index, rows in enumerate(tasks(kind, count)):
            numbers = {label: 2 * index + place for place, label in enumerate(rows.classes)}
            self.data.append(TaskData.of(self.backbone, rows, numbers))
            self.infos.append(TaskInfo(index, f"task {index}", tuple(numbers.values()), len(rows)))

    def learn(self, index: int) -> None:
        self.trainer.learn(self.infos[index], self.data[index])

    def begin(self, index: int) -> None:
        self.method.begin_task(self.infos[index], collect_of(self, index))

    def batch(self, index: int, rows: list[int], epoch: int | None = None) -> Batch:
        return self.trainer.batch(self.data[index], torch.tensor(rows), epoch=epoch)

    def train_mode(self) -> None:
        self.backbone.train(self.trainer.options.dropout)
        self.method.train_mode()


def collect_of(bench: Bench, index: int) -> Any:
    """The passes over the rows of a task that a method is given."""
    return Collector(bench.trainer, bench.infos[index], bench.data[index], None)


class LinearEncoder:
    """Inputs `(n, 5)` to 4 features by one matrix, in float64."""

    output_head = None

    feature_dim = 4
    default_targets = ("map",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential()
        self.model.add_module("map", nn.Linear(5, 4, bias=False))
        self.model.double().requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        return 20

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        raise AssertionError("there is no attention in this network")

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["x"])

    def token_mask(self, batch: dict[str, Tensor]) -> None:
        return None


class Rows:
    """Passes over rows `(n, 5)`, in batches of four."""

    def __init__(self, encoder: LinearEncoder, x: Tensor, labels: Tensor) -> None:
        self.encoder, self.x, self.labels = encoder, x, labels

    def __call__(self, visit: Callable[[Batch, Tensor], None] | None = None, **options: Any) -> int:
        for rows in torch.arange(len(self.x)).split(4):
            batch = Batch({"x": self.x[rows]}, self.labels[rows], rows=rows)
            if visit is not None:
                with torch.no_grad():
                    features = self.encoder.features(batch.inputs)
                visit(batch, features)
        return len(self.x)

    def rows(self, numbers: Tensor | None = None) -> tuple[Any, Tensor]:
        chosen = torch.arange(len(self.x)) if numbers is None else numbers
        return EncodedImages(np.zeros((len(chosen), 1, 1, 3), dtype=np.uint8), chosen.numpy()), self.labels[chosen]


def linear_method(name: str, **options: Any) -> tuple[Any, LinearEncoder]:
    """A method that trains all of a linear encoder."""
    spec, encoder = method_spec(name), LinearEncoder()
    return spec.method_class(spec.options({"train": "all", **options}), encoder, seed=1), encoder


def linear_rows(encoder: LinearEncoder, task: int, count: int = 10) -> Rows:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return Rows(encoder, x, 2 * task + (x[:, task] > 0).long())


def begin_linear(method: Any, task: int, rows: Rows) -> TaskInfo:
    info = TaskInfo(task, f"task {task}", (2 * task, 2 * task + 1), len(rows.x))
    method.begin_task(info, rows)
    method.heads.double()
    return info


def gradients(method: Method) -> dict[str, list[Tensor | None]]:
    return {name: [p.grad for p in group] for name, group in method.parameters().items()}
