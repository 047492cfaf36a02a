"""Methods with isolated tasks on tiny networks: made, trained on toy tasks, and asked for logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlora.backbones import Backbone, load_backbone
from everlora.backbones.cifar_resnet import CifarResNet, CifarResNetBackbone
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.methods import method_spec
from everlora.methods.base import Batch, Method, TaskInfo
from everlora.streams import Examples
from everlora.training import TaskData, TaskTrainer, TrainingOptions, TrainingReport
from tests.methods.conv_builders import save_resnet
from tests.toy import tiny_model, toy_images, toy_texts

KINDS = ("resnet", "vit", "bert")
CLASSES = tuple(f"class {letter}" for letter in "abcdefgh")
NUMBERS = {name: number for number, name in enumerate(CLASSES)}


def save_kind(kind: str, folder: Path) -> Path:
    """Save a tiny network of one of `KINDS`."""
    return save_resnet(folder) if kind == "resnet" else tiny_model(kind, folder)


def examples(kind: str, index: int, rows: int = 8) -> Examples:
    """Rows of one task of two classes."""
    names = CLASSES[2 * index : 2 * index + 2]
    if kind == "bert":
        return toy_texts(names, rows, seed=index + 1)
    return toy_images(names, rows, seed=index + 1, size=32 if kind == "resnet" else 16)


class Bench:
    """A method on a tiny network, and the loop that trains it."""

    def __init__(self, kind: str, folder: Path, name: str, options: Mapping[str, Any], **training: Any) -> None:
        self.kind = kind
        self.backbone: Backbone = load_backbone(folder)
        spec = method_spec(name)
        self.method: Method = spec.method_class(spec.options(options), self.backbone, seed=1)
        defaults = {"epochs": 3, "batch_size": 8, "lr": 5e-3, "augment": "none"}
        self.trainer = TaskTrainer(self.backbone, self.method, TrainingOptions(**{**defaults, **training}))

    def data(self, index: int) -> TaskData:
        return TaskData.of(self.backbone, examples(self.kind, index), NUMBERS)

    def learn(self, index: int, validation: TaskData | None = None) -> TrainingReport:
        data = self.data(index)
        info = TaskInfo(index, f"task {index}", (2 * index, 2 * index + 1), len(data))
        return self.trainer.learn(info, data, validation)

    def batch(self, index: int, rows: int | None = None) -> Batch:
        data = self.data(index)
        return self.trainer.batch(data, torch.arange(rows or len(data)), epoch=None)

    def logits(self, index: int, task: int | None, of: int | None = None) -> Tensor:
        """Scores of a task's rows, or of those of task `of`; with a task given those of its own two classes."""
        self.backbone.eval()
        with torch.no_grad():
            scores = self.method.logits(self.batch(index if of is None else of), task)
        return scores if task is None else scores[:, 2 * task : 2 * task + 2]


def deep_resnet(blocks: int) -> CifarResNetBackbone:
    """A residual network of full depth with random weights: 3 blocks a stage make 20 layers, 5 make 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CifarResNet(blocks)
    return CifarResNetBackbone(
        model,
        ImageInputs(ImageTransform(size=32, mean=None, std=None)),
        source="tests",
        folder=Path(),
        architecture="cifar_resnet",
        feature_dim=64,
        pooling="mean",
    )


class OneRowAClass:
    """Passes over a task that has one black image a class."""

    def __init__(self, backbone: Backbone, task: TaskInfo) -> None:
        self.backbone = backbone
        self.task = task

    def __call__(self, visit: Any = None, **options: Any) -> int:
        labels = torch.tensor(self.task.classes)[: 1 if "max_batches" in options else None]
        inputs = {"pixel_values": torch.zeros(len(labels), 3, 32, 32)}
        with torch.no_grad():
            features = self.backbone.features(inputs)
        if visit is not None:
            visit(Batch(inputs, labels), features)
        return len(labels)


def begin_and_end(method: Method, backbone: Backbone, tasks: int, classes: int = 10) -> None:
    """Let a method go through tasks of ten classes without a step of training."""
    for index in range(tasks):
        info = TaskInfo(index, f"task {index}", tuple(range(classes * index, classes * (index + 1))), classes)
        collect: Any = OneRowAClass(backbone, info)
        method.begin_task(info, collect)
        method.end_task(info, collect)
