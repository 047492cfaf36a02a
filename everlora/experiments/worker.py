"""A process of a run with several workers: `python -m everlora.experiments.worker PLAN`.

It reads one job per line from standard input, `["row", seed]`, and writes messages to standard output, one JSON object
per line: `progress`, and `done` or `error` when the job has ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from everlora.errors import EverloraError
from everlora.experiments.execution import execute
from everlora.experiments.plan import Plan, Streams
from everlora.experiments.records import read_json
from everlora.training import answering, signals_ask

__all__ = ["main"]


def main(plan_file: Path, jobs: IO[str], messages: IO[str]) -> None:
    """Work on the jobs until there are no more.

    Args:
        plan_file: the plan; results lie beside it.
        jobs: lines `["row", seed]`.
        messages: where the answers go.
    """
    plan = Plan.from_json(read_json(plan_file))

    def send(**message: Any) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    def progress(stage: str, done: int, total: int) -> None:
        send(kind="progress", stage=stage, done=done, total=total)

    streams = Streams(plan, progress)
    for line in jobs:
        row, seed = json.loads(line)
        try:
            execute(plan, row, seed, streams=streams, out=plan_file.parent, progress=progress)
        except EverloraError as error:
            send(kind="error", type=type(error).__name__, text=str(error))
        else:
            send(kind="done")


if __name__ == "__main__":
    # Whatever a library prints must not get between the messages.
    channel, sys.stdout = sys.stdout, sys.stderr
    with signals_ask(), answering():
        main(Path(sys.argv[1]), sys.stdin, channel)
