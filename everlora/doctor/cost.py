"""What a task will cost, from what a sample of rows did."""

from __future__ import annotations

from everlora.doctor.coming import Estimate
from everlora.doctor.dry_run import Measured
from everlora.training import TrainingOptions
from everlora.training.options import Length, steps_per_epoch

__all__ = ["estimate", "how_it_was_made"]


def estimate(row: str, task: str, measured: Measured, options: TrainingOptions, *, rows: int, width: float) -> Estimate:
    """Time of a task: its steps, its passes over the rows, and the rest.

    Args:
        row: the method, or row of a recipe.
        task: name of the task.
        measured: on a sample.
        options: of the training.
        rows: that the task has, as they are encoded.
        width: their mean length in tokens, 1 for images; time of steps and passes grows with it.
    """
    steps = Length.of(options, steps_per_epoch(options, rows)).steps if measured.steps else 0
    longer = width / measured.width
    stepping = steps * measured.step_seconds * longer
    passing = measured.pass_seconds * longer * rows / measured.rows
    return Estimate(
        row=row,
        task=task,
        rows=rows,
        steps=steps,
        seconds=stepping + passing + measured.fixed_seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
        parameters=measured.parameters,
    )


def how_it_was_made(row: str, task: str, measured: Measured, *, device: str, batch_size: int) -> str:
    """One sentence on where the figures are from."""
    if not measured.steps:
        steps = "nothing is trained, so time is that of passes"
    else:
        steps = f"{measured.steps} steps of up to {batch_size} rows took {measured.step_seconds:.3g} s each"
    passes = f"passes over {measured.rows} rows {measured.pass_seconds:.3g} s, the rest {measured.fixed_seconds:.3g} s"
    memory = "memory is the peak of the process" if device == "cpu" else "memory is the peak of the device's allocator"
    return f"{row}, measured on '{task}' ({device}): {steps}, {passes}; {memory}; evaluation is not counted."
