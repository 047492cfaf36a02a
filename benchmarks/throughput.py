"""Images per second and peak memory of a ViT-B/16, beside plain LoRA by PEFT and the bare model, in one run.

    python benchmarks/throughput.py --device cuda --out benchmarks/results/throughput.json
    python benchmarks/throughput.py --blocks 1 --width 64 --batch 2 --tokens 17 --rounds 2        # anywhere, in seconds

The network has the shape of a ViT-B/16 at 224 pixels and random weights, so nothing here is an accuracy. Every row is
timed in float32 and under bfloat16 autocast, as it is and through `torch.compile`; rows take turns, and the figure is
the median. `bare` trains all of its own weights; the others train their branches, of rank 10 on query and value, and
the head. "Task 20" has 19 past blocks. Peak memory is the device allocator's, weights included; on a CPU it is what a
step allocates, weights left out. A row that cannot be compiled says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from step_cost import (
    Setup,
    Step,
    forward_pass,
    inflora,
    machine,
    plain_lora,
    sd_lora,
    seconds,
    step_bytes,
    training_step,
)
from torch import nn

ROWS: dict[str, Callable[[Setup], nn.Module]] = {
    "bare": lambda setup: setup.model().requires_grad_(True),
    "PEFT's LoRA": lambda setup: plain_lora(setup, 1),
    "inflora, task 1": lambda setup: inflora(setup, 1),
    "inflora, task 20": lambda setup: inflora(setup, 20),
    "sd_lora, task 1": lambda setup: sd_lora(setup, 1),
    "sd_lora, task 20": lambda setup: sd_lora(setup, 20),
}
WARM_UP = 3


@dataclasses.dataclass
class Figure:
    """What one row gave.

    Attributes:
        row: its name.
        dtype: of the computation.
        compiled: whether through `torch.compile`.
        training: images a second of a training step.
        inference: images a second of an evaluation.
        peak_mib: memory of a training step.
        error: why there are none.
    """

    row: str
    dtype: str
    compiled: bool
    training: float | None = None
    inference: float | None = None
    peak_mib: float | None = None
    error: str = ""


def measured(setup: Setup, *, compiled: bool, rounds: int) -> Iterator[Figure]:
    """Time all rows in turns with one precision."""
    figures = {name: Figure(name, str(setup.dtype).removeprefix("torch."), compiled) for name in ROWS}
    for kind, make in (("training", training_step), ("inference", forward_pass)):
        steps: dict[str, Step] = {}
        for name, build in ROWS.items():
            if figures[name].error:
                continue
            try:
                steps[name] = _prepared(setup, build, make, compiled=compiled)
            except Exception as error:  # a compiler raises whatever it likes
                figures[name].error = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _, name in itertools.product(range(rounds), steps):
            times[name].append(seconds(steps[name]))
        for name, found in times.items():
            setattr(figures[name], kind, setup.batch / statistics.median(found))
            if kind == "training":
                figures[name].peak_mib = _peak(setup, steps[name]) / 2**20
    yield from figures.values()


def _prepared(setup: Setup, build: Callable[[Setup], nn.Module], make: Callable[..., Step], *, compiled: bool) -> Step:
    """A step that has run often enough for caches, compilers and the optimiser's state."""
    model = build(setup)
    step = make(setup, cast(nn.Module, torch.compile(model)) if compiled else model)
    for _ in range(WARM_UP):
        step()
    return step


def _peak(setup: Setup, step: Step) -> int:
    if setup.device.type != "cuda":
        return step_bytes(setup, step)
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def table(figures: list[dict[str, Any]]) -> str:
    """Figures as lines of text, with ratios to PEFT's LoRA of the same precision and compilation."""
    plain = {(f["dtype"], f["compiled"]): f for f in figures if f["row"] == "PEFT's LoRA"}
    lines = [
        f"{'row':<18}{'precision':<10}{'compiled':<9}{'train/s':>9}{'x PEFT':>8}{'infer/s':>9}{'x PEFT':>8}{'MiB':>9}"
    ]
    for f in figures:
        start = f"{f['row']:<18}{f['dtype']:<10}{'yes' if f['compiled'] else 'no':<9}"
        if f["error"]:
            lines.append(start + f["error"])
            continue
        base = plain[f["dtype"], f["compiled"]]
        cells = [
            f"{f[k]:>9.1f}{f[k] / base[k]:>8.2f}" if base[k] else f"{f[k]:>9.1f}{'':>8}"
            for k in ("training", "inference")
        ]
        lines.append(start + "".join(cells) + f"{f['peak_mib']:>9.0f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, text in (
        ("blocks", 12, "of the transformer"),
        ("width", 768, "of the transformer"),
        ("batch", 64, "images in a step"),
        ("tokens", 197, "of an image, the class token included"),
        ("rank", 10, "of every block"),
        ("rounds", 20, "steps for each figure"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="file to write the figures to")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    given = parser.parse_args()
    shape = {name: getattr(given, name) for name in ("blocks", "width", "batch", "tokens", "rank")}
    figures: list[dict[str, Any]] = []
    for dtype, compiled in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        if compiled and given.no_compile:
            continue
        setup = Setup(**shape, device=torch.device(given.device), dtype=dtype)
        figures += [dataclasses.asdict(figure) for figure in measured(setup, compiled=compiled, rounds=given.rounds)]
        torch.compiler.reset()
    about = {"command": "python benchmarks/throughput.py", "date": datetime.date.today().isoformat()}
    result = {**about, **machine(setup), "weights": "random", **shape, "figures": figures}
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if given.json else table(figures))


if __name__ == "__main__":
    main()
