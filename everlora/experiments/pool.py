"""Rows and seeds in several processes of one thread each, talking in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from everlora import errors
from everlora.errors import EverloraError
from everlora.experiments.data import Progress
from everlora.training import answering, is_asked

__all__ = ["run_jobs"]

Job = tuple[str, int]

# One thread a process: two processes of two threads on two cores would wait for each other.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LAST_CHARACTERS = 2000


@answering()
def run_jobs(
    plan_file: Path,
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Progress,
    module: str = "everlora.experiments.worker",
) -> None:
    """Run every job in one of `workers` processes; each process takes the next job when it is done with one.

    Args:
        plan_file: the plan, as JSON; results lie beside it.
        jobs: pairs of row and seed.
        workers: number of processes.
        progress: called from one thread at a time.
        module: what a process runs; it is given the plan's file and serves jobs, see `serve`.

    Raises:
        EverloraError: the first error of a job, as the same class; the other processes are asked to stop. Also where
            somebody asked this process.
        RuntimeError: a process died; the end of what it wrote is quoted.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock = threading.Lock()
    failures: list[BaseException] = []
    command = [sys.executable, "-m", module, str(plan_file)]
    crew = [_Worker(command, waiting, progress, lock, failures) for _ in range(min(workers, len(jobs)))]
    try:
        for worker in crew:
            worker.start()
        asked = False
        while any(worker.is_alive() for worker in crew) and not failures:
            if is_asked() and not asked:
                asked = True
                for worker in crew:
                    worker.ask()
            for worker in crew:
                worker.join(timeout=0.2)
    finally:
        for worker in crew:
            worker.stop()
    if failures:
        raise failures[0]


class _Worker(threading.Thread):
    """A thread that feeds one process."""

    def __init__(
        self,
        command: Sequence[str],
        waiting: queue.SimpleQueue[Job],
        progress: Progress,
        lock: threading.Lock,
        failures: list[BaseException],
    ) -> None:
        super().__init__(daemon=True)
        self._waiting, self._progress, self._lock, self._failures = waiting, progress, lock, failures
        self._words: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=os.environ | dict.fromkeys(_THREAD_VARIABLES, "1") | {"TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self) -> None:
        """Hand out jobs until there are none."""
        try:
            while not self._failures:
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    break
                self._do(job)
        except BaseException as error:  # the caller's thread raises it
            self._failures.append(error)

    def ask(self) -> None:
        """Ask the process to save the task that it learns and to stop."""
        self._process.terminate()

    def stop(self) -> None:
        """End the process, whatever it is doing, and wait for it and for this thread."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what a dead process did not take is still to be sent
                self._process.stdin.close()
        if self._failures or self.is_alive():
            self._process.terminate()
        self._process.wait()
        if self.ident is not None:
            self.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._words.close()

    def _do(self, job: Job) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._complain_about_death(job)
        for line in self._process.stdout:
            message = json.loads(line)
            if message["kind"] == "progress":
                with self._lock:
                    self._progress(message["stage"], message["done"], message["total"])
            elif message["kind"] == "error":
                raise _error_from(message)
            else:
                return
        self._complain_about_death(job)

    def _complain_about_death(self, job: Job) -> None:
        code = self._process.wait()
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()
        raise RuntimeError(
            f"The process for {job[0]} with seed {job[1]} ended with code {code}: {words[-_LAST_CHARACTERS:]}"
        )


def _error_from(message: dict[str, Any]) -> EverloraError:
    kind = getattr(errors, str(message["type"]), EverloraError)
    return kind(message["text"]) if issubclass(kind, EverloraError) else EverloraError(message["text"])
