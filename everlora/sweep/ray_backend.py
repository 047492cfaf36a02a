"""Trials on the machines of a Ray cluster, each a trial of Ray Tune. Needs the extra `ray`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlora.errors import EverloraError, UnsupportedError
from everlora.experiments.records import read_json
from everlora.sweep.plan import SweepPlan
from everlora.sweep.streams import SearchStreams
from everlora.sweep.trial import run_trial

__all__ = ["run_with_ray"]


def run_with_ray(plan_file: Path, jobs: Sequence[tuple[str, int]], *, workers: int) -> None:
    """Run every job as a trial of Ray Tune; results go beside the plan, where finished ones are found again.

    Ray decides where and when; a cluster that is running is joined by its usual variables (`RAY_ADDRESS`), else one is
    started on this machine with as many processors as there are workers.

    Args:
        plan_file: the sweep's plan, on a disk that all machines of the cluster share.
        jobs: pairs of a trial's name and a seed.
        workers: trials at a time.

    Raises:
        UnsupportedError: Ray is not installed.
        EverloraError: a trial ended with an error that is no result.
    """
    try:
        import ray
        from ray import tune
    except ImportError as error:
        message = "--backend ray needs Ray Tune, which is not installed; install everlora with its extra 'ray'."
        raise UnsupportedError(message) from error
    if not ray.is_initialized():
        _join_or_start(ray, workers)
    named = [f"{name}:{seed}" for name, seed in jobs]
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan_file=str(plan_file.resolve())), {"cpu": 1}),
        param_space={"job": tune.grid_search(named)},
        tune_config=tune.TuneConfig(max_concurrent_trials=workers),
        run_config=tune.RunConfig(name="ray", storage_path=str(plan_file.resolve().parent), verbose=0),
    )
    failures = tuner.fit().errors
    if failures:
        raise EverloraError(f"a trial of the sweep ended on the cluster: {str(failures[0]).strip().splitlines()[-1]}")


def _join_or_start(ray: Any, workers: int) -> None:
    import os

    joined: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **joined)


def _trial(config: dict[str, Any], plan_file: str) -> dict[str, Any]:
    """One job, in a process of Ray's."""
    name, _, seed = config["job"].rpartition(":")
    plan = SweepPlan.from_json(read_json(Path(plan_file)))
    streams = SearchStreams(plan)
    out = Path(plan_file).parent
    outcome = run_trial(plan, plan.trial(name), int(seed), streams=streams, out=out, progress=lambda *_: None)
    return {"value": outcome["value"]}
