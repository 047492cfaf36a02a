"""A process of a sweep with several workers: `python -m everlora.sweep.worker PLAN`, like that of a run."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from everlora.experiments.data import Progress
from everlora.experiments.records import read_json
from everlora.experiments.worker import serve, start
from everlora.sweep.plan import SweepPlan
from everlora.sweep.streams import SearchStreams
from everlora.sweep.trial import run_trial

__all__ = ["main"]


def main(plan_file: Path, jobs: IO[str], messages: IO[str]) -> None:
    """Work on trials until there are no more.

    Args:
        plan_file: the sweep's plan; results lie beside it.
        jobs: lines `["trial", seed]`.
        messages: where the answers go.
    """
    plan = SweepPlan.from_json(read_json(plan_file))
    streams = SearchStreams(plan)

    def work(name: str, seed: int, progress: Progress) -> None:
        run_trial(plan, plan.trial(name), seed, streams=streams, out=plan_file.parent, progress=progress)

    serve(work, jobs, messages)


if __name__ == "__main__":
    start(main)
