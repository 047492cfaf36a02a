"""What each task costs, from the first to the fiftieth: seconds, memory and bytes on disk of whole learners.

    python benchmarks/task_scaling.py
    python benchmarks/task_scaling.py --tasks 100 --methods inflora_opt,sd_lora --json

Every learner learns the same stream of made-up images, two classes a task, on the packaged ViT, by the same calls a
user makes: passes over the data, training, consolidation and writing to disk are all in the seconds. The learners take
turns task by task, and the ratio is that of a method's seconds to those of plain sequential LoRA in the same round,
whose cost cannot grow; a machine that slows down for a while slows both. Accuracy is not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from processor import processor

from everlora import Learner
from everlora.streams import Examples

REFERENCE = "sequential"
SIZE = 32  # pixels


@dataclass
class Costs:
    """What one method spent.

    Attributes:
        seconds: of each task.
        adapter_bytes: factors held by the layers after each task.
        disk_bytes: size of the learner's directory after each task.
    """

    seconds: list[float] = field(default_factory=list)
    adapter_bytes: list[int] = field(default_factory=list)
    disk_bytes: list[int] = field(default_factory=list)


def images(task: int, rows: int) -> Examples:
    """Return noise around one mean a class, two classes that no other task has."""
    random = np.random.default_rng(task)
    labels = np.repeat(np.array([str(2 * task), str(2 * task + 1)], dtype=object), rows)
    means = random.integers(40, 216, (2, 1, 1, 3)).repeat(rows, axis=0)
    noise = random.integers(-40, 40, (2 * rows, SIZE, SIZE, 3))
    inputs = np.clip(means + noise, 0, 255).astype(np.uint8)
    return Examples("image", inputs, labels, np.arange(2 * rows, dtype=np.int64))


def adapter_bytes(learner: Learner) -> int:
    """Return the bytes of all frozen factors."""
    layers = learner.method.layers().values()
    return sum(factor.nbytes for layer in layers for factor in (layer.past_down, layer.past_up, layer.past_scale))


def disk_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(methods: list[str], tasks: int, rows: int, epochs: int, folder: Path) -> dict[str, Costs]:
    """Let the learners take turns, task by task."""
    learners = {name: Learner.create(folder / name, method=name, epochs=epochs) for name in methods}
    costs = {name: Costs() for name in methods}
    for task in range(tasks):
        examples = images(task, rows)
        for name, learner in learners.items():
            start = time.perf_counter()
            learner.learn(examples, name=f"task-{task + 1:03d}")
            costs[name].seconds.append(time.perf_counter() - start)
            costs[name].adapter_bytes.append(adapter_bytes(learner))
            costs[name].disk_bytes.append(disk_bytes(folder / name))
    return costs


def ratios(costs: dict[str, Costs]) -> dict[str, list[float]]:
    """Return each task's seconds over those of the reference in the same round."""
    base = costs[REFERENCE].seconds
    return {name: [a / b for a, b in zip(cost.seconds, base, strict=True)] for name, cost in costs.items()}


def machine() -> dict[str, object]:
    """Say where and with what it was measured."""
    threads = torch.get_num_threads()
    return {"machine": processor(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def ends(values: list[float]) -> tuple[float, float]:
    """Return the medians of the first and of the last fifth."""
    part = max(1, len(values) // 5)
    return statistics.median(values[:part]), statistics.median(values[-part:])


def print_table(costs: dict[str, Costs]) -> None:
    """Print one line for each method: first fifth of the tasks against last fifth."""
    relative = ratios(costs)
    print(f"\n{'method':<16}{'s/task first':>14}{'last':>8}{'x sequential first':>20}{'last':>8}{'growth':>9}", end="")
    print(f"{'adapters KiB/task':>19}{'disk KiB/task':>15}")
    for name, cost in costs.items():
        (first, last), (early, late) = ends(cost.seconds), ends(relative[name])
        tasks = len(cost.seconds)
        print(f"{name:<16}{first:>14.2f}{last:>8.2f}{early:>20.2f}{late:>8.2f}{late / early - 1:>9.1%}", end="")
        print(f"{cost.adapter_bytes[-1] / tasks / 1024:>19.0f}{cost.disk_bytes[-1] / tasks / 1024:>15.0f}")
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=50, help="in the stream (50)")
    parser.add_argument("--rows", type=int, default=32, help="training images of a class (32)")
    parser.add_argument("--epochs", type=int, default=4, help="over the images of a task (4)")
    parser.add_argument("--methods", default="inflora_opt,sd_lora", help="beside sequential (inflora_opt,sd_lora)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--json", action="store_true", help="print {method: [ratio of each task]} and nothing else")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a table or JSON."""
    options = arguments()
    torch.set_num_threads(options.threads)
    methods = list(dict.fromkeys([REFERENCE, *options.methods.split(",")]))
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(methods, options.tasks, options.rows, options.epochs, Path(folder))
    if options.json:
        print(json.dumps(ratios(costs)))
        return
    shape = {"tasks": options.tasks, "steps": options.epochs * -(-2 * options.rows // 32)}
    print("\n".join(f"{name}: {value}" for name, value in {**machine(), **shape}.items()))
    print_table(costs)


if __name__ == "__main__":
    main()
