"""One trial with one seed: learned like a run, judged by held-out training rows, its value kept as a small file."""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

from everlora.errors import EverloraError, InterruptedLearning, NumericError, ProcessError, StoreError
from everlora.experiments.data import Progress
from everlora.experiments.execution import execute, run_folder
from everlora.experiments.language import LanguageMeasurement
from everlora.experiments.measuring import ClassMeasurement, Measurement
from everlora.experiments.plan import method_row
from everlora.experiments.records import read_json, write_json
from everlora.sweep.plan import SweepPlan, Trial, value_of
from everlora.sweep.streams import SearchStreams

__all__ = ["OUTCOME", "outcome_file", "read_outcome", "run_trial"]

logger = logging.getLogger("everlora.sweep")

OUTCOME = "outcome.json"
_STOPS_ALL = (InterruptedLearning, StoreError, ProcessError)


def outcome_file(out: Path, trial: Trial, seed: int) -> Path:
    """Where the value of a trial with a seed lies."""
    return run_folder(out / "trials" / trial.name, trial.row, seed) / OUTCOME


def read_outcome(out: Path, trial: Trial, seed: int) -> dict[str, Any] | None:
    """What became of a trial with a seed: `value`, `seconds` and `error`; None where it is not finished."""
    file = outcome_file(out, trial, seed)
    return read_json(file) if file.exists() else None


def run_trial(
    plan: SweepPlan, trial: Trial, seed: int, *, streams: SearchStreams, out: Path, progress: Progress
) -> dict[str, Any]:
    """Try a setting with one seed, from where an earlier call stopped; a finished one is only read.

    A setting that cannot be trained is a result too: its loss is no longer finite, or the model does not take it. The
    first is final; what failed otherwise is tried again by the next call.

    Args:
        plan: of the sweep.
        trial: the setting.
        seed: of everything that is drawn.
        streams: gives the seed's stream of training rows.
        out: folder of the sweep.
        progress: called with a stage, the steps done and their number.

    Returns:
        `value`, None where there is none; `seconds` of learning; `error`, None or one sentence; `is_final`.

    Raises:
        InterruptedLearning: somebody asked for a stop.
        StoreError: the folder of the trial is damaged.
    """
    known = read_outcome(out, trial, seed)
    if known is not None and known["is_final"]:
        return known
    folder = run_folder(out / "trials" / trial.name, trial.row, seed)
    started = time.monotonic()
    outcome: dict[str, Any]
    try:
        record = _learn(plan, trial, seed, streams=streams, out=out, progress=progress)
        seconds = sum(float(cost["seconds"]) for cost in record["cost"])
        value = value_of(record, plan.metric)
        error = None if math.isfinite(value) else f"its {plan.metric} is not defined"
        outcome = {"value": value if error is None else None, "seconds": seconds, "error": error, "is_final": True}
    except _STOPS_ALL:
        raise
    except EverloraError as error:
        is_final = isinstance(error, NumericError)
        logger.warning("%s with %s, seed %d, failed: %s", trial.row, dict(trial.options), seed, error)
        seconds = time.monotonic() - started
        shutil.rmtree(folder, ignore_errors=True)  # another attempt begins anew
        outcome = {"value": None, "seconds": seconds, "error": str(error), "is_final": is_final}
    write_json(folder / OUTCOME, outcome)
    # What was learned on the way to a number is of no further use, and many trials would fill the disk.
    shutil.rmtree(folder / "learner", ignore_errors=True)
    return outcome


def _learn(
    plan: SweepPlan, trial: Trial, seed: int, *, streams: SearchStreams, out: Path, progress: Progress
) -> dict[str, Any]:
    run_plan = plan.plan_of(trial, seed=seed, num_tasks=streams.num_tasks(seed))
    words = ", ".join(f"{key}={value}" for key, value in trial.options.items())
    return execute(
        run_plan,
        trial.row,
        seed,
        streams=streams,
        out=out / "trials" / trial.name,
        progress=lambda stage, done, total: progress(f"{words}; {stage}" if words else stage, done, total),
        measurement=_measurement(plan, trial, out),
    )


def _measurement(plan: SweepPlan, trial: Trial, out: Path) -> Measurement:
    """Held-out rows alone: neither data sets of general abilities nor texts of the model's own."""
    if not plan.is_language:
        return ClassMeasurement()
    return LanguageMeasurement(
        retention=None,
        samples=None,
        general=(),
        answers=False,
        weights=method_row(plan.plan.recipe, trial.row).weights,
        folder=out,
    )
