"""Time of the DualGPM memory over a stream of tasks, against one float64 singular-value decomposition per layer.

    python benchmarks/memory_update.py
    python benchmarks/memory_update.py --spectra medium --tasks 10
    python benchmarks/memory_update.py --layers 2 --width 384 --json

Second moments are synthetic: a dominant mean direction, a power-law tail shared by all tasks and a part of its own for
each task. `medium` ones need tens of directions per task, `steep` ones a few, `flat` ones most of the space. The
thresholds rise linearly from 0.95 towards 1. The three decompositions of a layer are measured one after the other, in
turns of changing order, so that a busy machine slows all of them alike. Ratios are sums of seconds over sums of
seconds. The two memories grow independently; the projector error is the spectral norm of the difference of all they
protect.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeVar

import torch
from processor import processor
from torch import Tensor

from everlora.lowrank import GradientMemory

Result = TypeVar("Result")
DECOMPOSITIONS: tuple[Literal["full", "auto"], ...] = ("full", "auto")
SPECTRA = {
    "steep": (1.0, 30.0),
    "medium": (0.8, 10.0),
    "flat": (0.2, 3.0),
}  # exponent of the tail, strength of the mean


@dataclass
class Row:
    """Figures of one task, summed over the layers; seconds for updates and designs."""

    spectrum: str
    task: int
    threshold: float
    svd: float = 0.0
    full: float = 0.0
    auto: float = 0.0
    design_full: float = 0.0
    design_auto: float = 0.0
    projector_error: float = 0.0
    design_error: float = 0.0
    directions: int = 0
    differing: int = 0
    occupied: int = 0


def random_basis(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, `(width, width)` float64."""
    basis: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return basis


def moments(kind: str, width: int, layer: int, tasks: int) -> Iterator[Tensor]:
    """Yield the second moment of each task at one layer, `(width, width)` float64, exactly symmetric."""
    exponent, strength = SPECTRA[kind]
    generator = torch.Generator().manual_seed(1000 * layer + [*SPECTRA].index(kind))
    tail = torch.arange(1, width + 1, dtype=torch.float64) ** -(exponent * (1 + 0.03 * layer))
    shared, mean = random_basis(width, generator), torch.randn(width, generator=generator, dtype=torch.float64)
    for _ in range(tasks):
        jitter = 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)
        own = random_basis(width, generator)
        centre = mean + 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
        matrix = 0.7 * (shared * (tail * jitter)) @ shared.T + 0.3 * (own * tail) @ own.T
        matrix += strength / 10 * torch.outer(centre, centre) / centre.square().sum()
        yield (matrix + matrix.T) / 2


def timed(action: Callable[..., Result], *arguments: object) -> tuple[float, Result]:
    """Return the seconds an action took, and its result."""
    start = time.perf_counter()
    result = action(*arguments)
    return time.perf_counter() - start, result


def difference(left: Tensor, right: Tensor) -> float:
    """Spectral norm of the difference of the projectors on two sets of orthonormal columns; 1 for unlike counts."""
    if left.shape != right.shape:
        return 1.0
    return float(torch.linalg.matrix_norm(left - right @ (right.T @ left), 2)) if left.shape[1] else 0.0


def protected(memory: GradientMemory) -> Tensor:
    """Return all protected directions, `(dim, m)`."""
    occupied: Tensor = memory.state_dict()["occupied"]
    return occupied


def measure_layer(rows: list[Row], width: int, layer: int, rank: int) -> None:
    """Run all tasks of one layer and add its figures to the rows."""
    full, auto = (GradientMemory(width, decomposition=name) for name in DECOMPOSITIONS)
    for row, moment in zip(rows, moments(rows[0].spectrum, width, layer, len(rows)), strict=True):
        spent: dict[str, float] = {}
        spent["design_full"], expected = timed(full.design, moment, rank)
        spent["design_auto"], found = timed(auto.design, moment, rank)
        actions = (
            ("svd", torch.linalg.svd, (moment,)),
            ("full", full.update, (moment, row.threshold)),
            ("auto", auto.update, (moment, row.threshold)),
        )
        turn = (layer + row.task) % len(actions)
        for name, action, arguments in actions[turn:] + actions[:turn]:
            spent[name], _ = timed(action, *arguments)
        for name, seconds in spent.items():
            setattr(row, name, getattr(row, name) + seconds)
        row.projector_error = max(row.projector_error, difference(protected(full), protected(auto)))
        row.design_error = max(row.design_error, difference(expected.T * 3**0.5, found.T * 3**0.5))
        row.directions += full.last_added.shape[1]
        row.differing += full.last_added.shape != auto.last_added.shape
        row.occupied += full.occupied_rank


def measure(spectrum: str, options: argparse.Namespace) -> list[Row]:
    """Return one row per task."""
    rows = [Row(spectrum, t, 0.95 + 0.05 * t / options.tasks) for t in range(options.tasks)]
    for layer in range(options.layers):
        measure_layer(rows, options.width, layer, min(options.rank, options.width))
    return rows


def total(rows: list[Row]) -> Row:
    """Sum the figures of all tasks; the largest error."""
    result = Row(rows[0].spectrum, -1, 0.0)
    for field in fields(Row)[3:]:
        values = [getattr(row, field.name) for row in rows]
        setattr(result, field.name, max(values) if "error" in field.name or field.name == "occupied" else sum(values))
    return result


def machine() -> dict[str, object]:
    """Name what the figures depend on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(rows: list[Row], layers: int) -> None:
    """Print one line per task and the sum."""
    print(
        f"\n{rows[0].spectrum}\n{'task':>5} {'eps':>6} {'n/layer':>8} {'m/layer':>8} {'svd s':>7} {'full s':>7} "
        f"{'auto s':>7} {'svd/full':>8} {'svd/auto':>8} {'n differ':>8} {'error':>8}   "
        f"{'design s':>8} {'auto s':>7} {'svd/auto':>8} {'error':>8}"
    )
    for row in [*rows, total(rows)]:
        name, threshold = ("sum", "") if row.task < 0 else (str(row.task), f"{row.threshold:.3f}")
        print(
            f"{name:>5} {threshold:>6} {row.directions / layers:8.1f} {row.occupied / layers:8.1f} {row.svd:7.2f} "
            f"{row.full:7.2f} {row.auto:7.2f} {row.svd / row.full:8.2f} {row.svd / row.auto:8.2f} "
            f"{row.differing:8d} {row.projector_error:8.1e}   {row.design_full:8.2f} {row.design_auto:7.2f} "
            f"{row.svd / row.design_auto:8.2f} {row.design_error:8.1e}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rank", type=int, default=10, help="of the designed down-projections")
    parser.add_argument("--spectra", nargs="+", choices=[*SPECTRA], default=[*SPECTRA])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    if min(options.layers, options.width, options.tasks, options.rank, options.threads) < 1:
        parser.error("layers, width, tasks, rank and threads must be at least 1")
    torch.set_num_threads(options.threads)
    torch.linalg.svd(torch.eye(64, dtype=torch.float64))  # the first call loads the library
    results = {spectrum: measure(spectrum, options) for spectrum in options.spectra}
    if options.json:
        sums = {name: asdict(total(rows)) for name, rows in results.items()}
        tables = {name: [asdict(row) for row in rows] for name, rows in results.items()}
        print(json.dumps({"machine": machine(), "options": vars(options), "sums": sums, "tasks": tables}, indent=2))
        return
    print(" ".join(f"{key}={value}" for key, value in machine().items()))
    print(f"{options.layers} layers, width {options.width}, one float64 SVD of C per layer as the reference")
    for rows in results.values():
        print_table(rows, options.layers)


if __name__ == "__main__":
    main()
