"""Work in forked processes that are killed at random moments, and what a kill may leave of a learner directory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import everlora
from everlora.doctor import examine
from everlora.store import LearnerStore, newest_checkpoint
from everlora.store.layout import LEARNER_FILE

REPOSITORY = Path(everlora.__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}

Work = Callable[[], object]


class WorkFailedError(AssertionError):
    """A worker that nobody killed came to a bad end."""


def fork(work: Work, log: Path) -> int:
    """Do `work` in a fork of this process, which must have but one thread; what it says goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        # a killed process loses nothing that the system holds, so that waiting for the disk decides nothing here
        os.fsync = lambda _descriptor: None
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        sys.__stderr__.flush()
    finally:
        os._exit(code)


def kill_after(process: int, seconds: float | None, log: Path) -> bool:
    """Wait so long for a process to end, and kill it then; None waits for ever.

    Returns:
        Whether it was alive when it was killed, as the system says of how it ended.
    """
    watch = os.pidfd_open(process)
    try:
        select.select([watch], [], [], seconds)
    finally:
        os.close(watch)
    os.kill(process, signal.SIGKILL)  # of a process that has ended and was not asked for, this is without effect
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.waitstatus_to_exitcode(status):
        raise WorkFailedError(f"a worker ended with status {status}: {log.read_text()[-3000:]}")
    return False


def run(work: Work, log: Path) -> float:
    """Do `work` in a fork to its end; return the seconds it took."""
    start = time.monotonic()
    assert not kill_after(fork(work, log), None, log)
    return time.monotonic() - start


def kill_once(work: Work, log: Path, random: Random, longest: float) -> bool:
    """Do `work` in a fork, and kill it at a random moment up to `longest` seconds; whether it was alive then."""
    return kill_after(fork(work, log), random.uniform(0, longest), log)


def look(root: Path) -> str:
    """Look at a learner directory after a kill: it must be as it was, or as it would have become.

    Returns:
        Where the kill hit: `creating`, `without a checkpoint`, `after the commit`, or the stage of the task that the
        newest checkpoint is of.
    """
    if not (root / LEARNER_FILE).exists():
        return "creating"
    store = LearnerStore.open(root)
    store.verify()
    for found in examine(root, base=False):
        assert found.severity != "broken" and "passed over" not in found.what, found
    checkpoint = newest_checkpoint(root)
    if checkpoint is None:
        return "without a checkpoint"
    index = checkpoint.task["index"]
    assert index <= len(store.tasks)
    return str(checkpoint.values["stage"]) if index == len(store.tasks) else "after the commit"


def outcomes(module: str, folder: Path, *shares: tuple[object, ...], timeout: float = 1500) -> list[dict[str, Any]]:
    """Run a module once for each share, all at the same time; return the lines of JSON that they print."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, share in enumerate(shares):
            place = folder / str(number)
            place.mkdir()
            command = [sys.executable, "-m", module, str(place), *map(str, share)]
            with (place / "out").open("wb") as out, (place / "errors").open("wb") as errors:
                started.append(
                    subprocess.Popen(
                        command, env=ENVIRONMENT, cwd=REPOSITORY, stdout=out, stderr=errors, start_new_session=True
                    )
                )
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its forks go with it
                process.wait()
    for number, code in enumerate(codes):
        assert code == 0, (folder / str(number) / "errors").read_text()[-3000:]
    return [
        json.loads(line) for part in range(len(shares)) for line in (folder / f"{part}/out").read_text().splitlines()
    ]
