"""A process of a run with several workers: `python -m everlora.experiments.worker PLAN`.

It reads one job per line from standard input, `["row", seed]`, and writes messages to standard output, one JSON object
per line: `progress`, and `done` or `error` when the job has ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from everlora.errors import EverloraError
from everlora.experiments.data import Progress
from everlora.experiments.execution import execute
from everlora.experiments.plan import Plan, Streams
from everlora.experiments.records import read_json
from everlora.training import answering, signals_ask

__all__ = ["main", "serve", "start"]

Work = Callable[[str, int, Progress], None]
"""Does the job of a name and a seed, and reports how far it is."""


def main(plan_file: Path, jobs: IO[str], messages: IO[str]) -> None:
    """Work on the jobs until there are no more.

    Args:
        plan_file: the plan; results lie beside it.
        jobs: lines `["row", seed]`.
        messages: where the answers go.
    """
    plan = Plan.from_json(read_json(plan_file))
    streams = Streams(plan, _sender(messages))

    def work(row: str, seed: int, progress: Progress) -> None:
        execute(plan, row, seed, streams=streams, out=plan_file.parent, progress=progress)

    serve(work, jobs, messages)


def serve(work: Work, jobs: IO[str], messages: IO[str]) -> None:
    """Do jobs until there are no more, and answer each with `done` or `error`.

    Args:
        work: does one job; its errors are sent on.
        jobs: lines `["name", seed]`.
        messages: where the answers go.
    """
    progress = _sender(messages)
    for line in jobs:
        name, seed = json.loads(line)
        try:
            work(name, seed, progress)
        except EverloraError as error:
            _send(messages, kind="error", type=type(error).__name__, text=str(error))
        else:
            _send(messages, kind="done")


def start(process: Callable[[Path, IO[str], IO[str]], None]) -> None:
    """Run the main function of such a process on its arguments, input and output."""
    # Whatever a library prints must not get between the messages.
    channel, sys.stdout = sys.stdout, sys.stderr
    with signals_ask(), answering():
        process(Path(sys.argv[1]), sys.stdin, channel)


def _sender(messages: IO[str]) -> Progress:
    return lambda stage, done, total: _send(messages, kind="progress", stage=stage, done=done, total=total)


def _send(messages: IO[str], **message: Any) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


if __name__ == "__main__":
    start(main)
