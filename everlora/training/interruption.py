"""Asking a running task to stop: SIGTERM and Ctrl-C let it finish its step, and its checkpoint is written.

The program that owns the process says that signals ask (`signals_ask`), a learner says while it can answer
(`answering`), and the training loop looks whether somebody asked (`is_asked`). A signal at any other time stops at
once, and so does a second Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from everlora.errors import InterruptedLearning

__all__ = ["answering", "ask", "forget", "is_asked", "signals_ask", "stop_if_asked"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Wish:
    """Whether somebody wants the process to stop, and whether it is at work on a task that can be gone on with."""

    asked = False
    answering = 0


def ask() -> None:
    """Ask the task that is being learned to stop after its step."""
    _Wish.asked = True


def forget() -> None:
    """Take back that somebody asked."""
    _Wish.asked = False


def is_asked() -> bool:
    """Whether somebody asked."""
    return _Wish.asked


def stop_if_asked() -> None:
    """Stop between two tasks, where nothing is half done.

    Raises:
        InterruptedLearning: somebody asked.
    """
    if is_asked():
        raise InterruptedLearning("stopped as asked, between two tasks; the same command goes on from here.")


@contextmanager
def answering() -> Iterator[None]:
    """Say that a task is being learned, which will look at `is_asked`, inside a `with` block."""
    _Wish.answering += 1
    try:
        yield
    finally:
        _Wish.answering -= 1


@contextmanager
def signals_ask() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C ask instead of ending the process, inside a `with` block; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    forget()
    former = {number: signal.signal(number, _answer) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        forget()


def _answer(number: int, frame: FrameType | None) -> None:
    again = _Wish.asked
    ask()
    if not _Wish.answering or (again and number == signal.SIGINT):
        raise KeyboardInterrupt  # no Exception, so that nothing that is on the stack can take it for its own
