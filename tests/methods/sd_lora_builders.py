"""A toy network in float64 with three adapted layers, and the life of a task on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from everlora.methods import method_spec
from everlora.methods.base import Batch, TaskInfo
from everlora.methods.sd_lora import SDLoRA

WIDTH, HALF = 12, 6
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Attention(nn.Module):
    """Query, key and value; the value is narrower, as with grouped heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, WIDTH), nn.Linear(width, WIDTH)
        self.value = nn.Linear(width, HALF)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2) / WIDTH**0.5, dim=-1)
        return weights @ torch.tanh(self.value(x))


class ToyEncoder:
    """Tokens `(n, 3, width)` through two such layers, mean over tokens."""

    output_head = None

    feature_dim = HALF
    default_targets = ("key", "value")

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(Attention(WIDTH), Attention(HALF)).to(dtype).requires_grad_(False)
        self.dtype = dtype

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        return roles

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["x"].to(self.dtype)).mean(1)

    def token_mask(self, batch: dict[str, Tensor]) -> None:
        return None


def data(task: int, rows: int = 24) -> Batch:
    """Rows of two classes of their own."""
    generator = torch.Generator().manual_seed(100 + task)
    x = torch.randn(rows, 3, WIDTH, generator=generator, dtype=torch.float64)
    return Batch({"x": x}, (x[:, 0, task % WIDTH] > 0).long() + 2 * task)


def make(encoder: ToyEncoder | None = None, *, name: str = "sd_lora", **options: Any) -> tuple[SDLoRA, ToyEncoder]:
    """A method on a toy encoder."""
    encoder = encoder or ToyEncoder()
    spec = method_spec(name)
    method = SDLoRA(spec.options({"rank": 2, **options}), encoder, seed=7)
    method.heads.to(encoder.dtype)
    return method, encoder


def collect(*args: Any, **options: Any) -> int:
    raise AssertionError("this method makes no pass of its own over the rows")


def info(task: int) -> TaskInfo:
    return TaskInfo(task, f"task {task}", (2 * task, 2 * task + 1), 24)


def begin(method: SDLoRA, encoder: ToyEncoder, task: int) -> None:
    method.begin_task(info(task), collect)
    method.heads.to(encoder.dtype)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.3, momentum=0.9)


def train(method: SDLoRA, task: int, *, steps: int = 6, optimizer: Optimizer = sgd) -> None:
    groups = [
        {"params": params, **({"weight_decay": 0.0} if name == "magnitudes" else {})}
        for name, params in method.parameters().items()
        if params
    ]
    made = optimizer(groups)
    for _ in range(steps):
        made.zero_grad()
        method.loss(data(task)).value.backward()
        made.step()


def learn(method: SDLoRA, encoder: ToyEncoder, *tasks: int, steps: int = 6, optimizer: Optimizer = sgd) -> None:
    for task in tasks:
        begin(method, encoder, task)
        train(method, task, steps=steps, optimizer=optimizer)
        method.end_task(info(task), collect)


def reload(method: SDLoRA, **options: Any) -> tuple[SDLoRA, ToyEncoder]:
    """A new method that was given this one's state."""
    encoder = ToyEncoder(next(iter(method.layers().values())).weight.dtype)
    other = SDLoRA(copy.deepcopy(method.options), encoder, seed=7)
    other.load_state(copy.deepcopy(method.state()))
    return other, encoder


def weights(method: SDLoRA) -> dict[str, Tensor]:
    """Effective weight of every adapted layer."""
    return {name: layer.effective_weight().detach().clone() for name, layer in method.layers().items()}


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Largest relative Frobenius distance of the weights of a layer."""
    return max(float((one[name] - two[name]).norm() / two[name].norm()) for name in one)


def span_of_old(method: SDLoRA, name: str, beta: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Factors `down`, `up` of `sum_i beta_i M_i` over the past blocks of a layer; their rank is the sum of ranks."""
    blocks = method.layers()[name].blocks()
    down = torch.cat([block.down for block in blocks])
    up = torch.cat([block.up * factor for block, factor in zip(blocks, beta, strict=True)], dim=1)
    return down, up
