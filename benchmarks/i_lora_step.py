"""Time of a step of I-LoRA against a step of replay with the same rows.

    python benchmarks/i_lora_step.py MODEL
    python benchmarks/i_lora_step.py MODEL --rows 16 --tokens 128 --targets all-linear --json

MODEL is a folder of a causal language model. Both methods have an adapter of rank 8 on the same layers and the
same memory; a step is all that training does on ROWS rows of the task and as many of the memory, of TOKENS tokens each,
with AdamW. The steps are timed in turns, and the figure is the median of the ratios of neighbours, so
that a busy machine slows both alike. Counted in forward passes of ROWS rows, replay does 4 and I-LoRA 5: 1.25.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.backbones.tokens import EncodedTokens
from everlora.methods import method_spec
from everlora.methods.base import Batch, TaskInfo
from everlora.methods.language_targets import language_targets

Step = Callable[[], None]


class RandomTask:
    """A task of random tokens, as the passes over its rows that a method is given."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        ids = torch.randint(3, vocabulary, (count * tokens,)).numpy().astype(np.uint16)
        offsets = np.arange(0, len(ids) + 1, tokens)
        ones = np.ones(count, dtype=np.int32)
        self.encoded = EncodedTokens(ids, offsets, ones, ones * tokens, np.arange(count))

    def rows(self, numbers: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return rows by number."""
        chosen = torch.arange(len(self.encoded)) if numbers is None else numbers
        return self.encoded.select(chosen), torch.zeros(len(chosen), dtype=torch.long)


def training_step(arguments: argparse.Namespace, name: str, **options: Any) -> Step:
    """Return one step of a method on fixed rows of a second task."""
    torch.manual_seed(0)
    backbone = load_backbone(arguments.model, kind="causal_lm")
    targets = arguments.targets and tuple(language_targets(backbone, arguments.targets))
    spec = method_spec(name)
    method: Any = spec.method_class(spec.options({"alpha": 16, "targets": targets, **options}), backbone, seed=1)
    data = RandomTask(arguments.rows, arguments.tokens, backbone.vocab_size)
    for index in range(2):
        task = TaskInfo(index, f"task {index}", (), arguments.rows, steps=arguments.pairs)
        method.begin_task(task, data)
        if index == 0:
            method.end_task(task, data)
    rows, generator = torch.arange(arguments.rows), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(method.parameters()["adapter"], lr=1e-4)
    backbone.train()

    def batch_of(encoded: Any, **more: Any) -> Batch:
        inputs = backbone.collate(encoded, rows)
        return Batch(inputs, inputs.pop("labels"), rows=rows, **more)

    def step() -> None:
        method.before_step(rows)
        recalled = method.recall(len(rows), generator)
        optimizer.zero_grad(set_to_none=True)
        batch = batch_of(data.encoded, memory=batch_of(recalled.encoded, tasks=recalled.tasks))
        torch.autograd.backward(method.loss(batch).value)
        optimizer.step()
        method.after_step(True)

    return step


def seconds(step: Step) -> float:
    """Time one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the median ratio and the medians of both."""
    replay = training_step(arguments, "replay", rank=8)
    mine = training_step(arguments, "i_lora", selective_update=arguments.selective)
    for step in (replay, mine) * 3:
        step()
    pairs = [(seconds(replay), seconds(mine)) for _ in range(arguments.pairs)]
    return {
        "ratio": statistics.median(own / other for other, own in pairs),
        "replay_seconds": statistics.median(other for other, _ in pairs),
        "i_lora_seconds": statistics.median(own for _, own in pairs),
    }


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--targets", nargs="*", default=None)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--selective", action="store_true", help="with selective_update, 1.5 in forward passes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"replay {found['replay_seconds'] * 1000:.1f} ms, i_lora {found['i_lora_seconds'] * 1000:.1f} ms a step")
    print(f"median ratio over {arguments.pairs} pairs: {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
