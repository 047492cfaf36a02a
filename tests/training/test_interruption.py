"""Asking a task to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.errors import InterruptedLearning
from everlora.store import newest_checkpoint
from everlora.training import answering, signals_ask, stop_if_asked
from everlora.training.interruption import ask, forget, is_asked
from tests.toy import tiny_model, toy_learner, toy_texts


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    forget()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_ask_only_while_somebody_answers() -> None:
    former = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals_ask():
        with answering():
            _send(signal.SIGTERM)
            _send(signal.SIGTERM)
            assert is_asked()
            with pytest.raises(KeyboardInterrupt):  # the second wish is urgent
                _send(signal.SIGINT)
        with pytest.raises(InterruptedLearning, match="between two tasks"):
            stop_if_asked()
    assert not is_asked()
    stop_if_asked()
    for number in (signal.SIGINT, signal.SIGTERM):
        with signals_ask(), pytest.raises(KeyboardInterrupt):
            _send(number)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == former


def test_only_the_main_thread_listens() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with signals_ask():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("when", ["before", "pass", "step"])
def test_a_stop_that_is_asked_for(when: str, bert: Path, tmp_path: Path) -> None:
    rows = toy_texts(["a", "b"])
    whole = toy_learner(tmp_path / "whole", bert, "inflora", device="cpu", eval_batch_size=6)
    whole.learn(rows)
    learner = toy_learner(tmp_path / "learner", bert, "inflora", device="cpu", eval_batch_size=6)
    calls: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(stage)
        wanted = {"pass": stage == "inputs before training", "step": stage.startswith("train")}
        if wanted.get(when, False) and done == 2:
            ask()

    if when == "before":
        ask()
    said = "goes on from it" if when != "before" else "goes on from the checkpoint before, if there is one"
    with pytest.raises(InterruptedLearning, match=said):
        learner.learn(rows, progress=progress)
    forget()
    found = newest_checkpoint(tmp_path / "learner")
    assert (found is None) == (when == "before")
    stages = {"pass": "begin", "step": "train"}
    if found is not None:
        assert found.values["stage"] == stages[when]
    again: list[Any] = []
    opened = Learner.open(tmp_path / "learner", device="cpu")
    opened.learn(rows, progress=lambda stage, done, total: again.append((stage, done)))
    assert opened.digest == whole.digest
    if when == "pass":
        assert ("inputs before training", 3) not in again and ("inputs before training", 4) in again
    if when == "step":
        assert ("train task-1", 2) not in again and ("train task-1", 3) in again
