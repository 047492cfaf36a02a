"""A disk that is full or fails at any single step: the learner is as it was, says so, and a later try succeeds."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.errors import StoreError
from everlora.store import LearnerStore
from tests.store.builders import HEADER, add_task, make_learner, snapshot
from tests.store.faults import Countdown
from tests.toy import toy_learner, toy_texts

CODES = (errno.ENOSPC, errno.EIO)


def fail_everywhere(
    prepare: Callable[[], Any],
    action: Callable[[Any], Any],
    check: Callable[[Any, bool], None],
    *,
    code: int,
    moment: str = "before",
    lasting: bool = False,
    stride: int = 1,
) -> int:
    """Run `action` on what `prepare` makes, failing one step later each time, until nothing fails; count the failures.

    A failure must come out as one sentence, unless the action had made its change by then; `check` gets what was
    prepared and whether the action succeeded.
    """
    count = 0
    for survive in range(0, 2000, stride):
        prepared = prepare()
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(
                patch, survive, moment, error=lambda: OSError(code, os.strerror(code)), lasting=lasting
            )
            try:
                action(prepared)
            except StoreError as error:
                assert countdown.struck and "\n" not in str(error) and os.strerror(code) in str(error)
                succeeded = False
            else:
                succeeded = True
        check(prepared, succeeded)
        if not countdown.struck:
            assert succeeded
            return count
        count += 1
    raise AssertionError("the action never came to an end")


_QUICK = ((errno.ENOSPC, "before", True),)
MODES = [
    pytest.param(*mode, marks=() if mode in _QUICK else pytest.mark.slow)
    for mode in itertools.product(CODES, ("before", "after"), (False, True))
]


def _write(root: Path, change: Callable[[LearnerStore], Any]) -> None:
    with LearnerStore.open(root, write=True) as store:
        change(store)


CHANGES: dict[str, Callable[[LearnerStore], Any]] = {
    "add": lambda store: add_task(store, "d"),
    "rollback": lambda store: store.rollback(1),
    "drop a state": lambda store: store.drop_state(1),
    "move the base": lambda store: store.set_base_model("/elsewhere"),
}


@pytest.mark.parametrize(("code", "moment", "lasting"), MODES)
@pytest.mark.parametrize("name", list(CHANGES))
def test_every_step_of_a_change(name: str, code: int, moment: str, lasting: bool, tmp_path: Path) -> None:
    original = make_learner(tmp_path / "original", ("a", "b", "c"), keep_states="all")
    shutil.copytree(original, tmp_path / "changed")
    _write(tmp_path / "changed", CHANGES[name])
    expected = {place: _seen(tmp_path / place) for place in ("original", "changed")}
    content = set(snapshot(original).values()) if name in ("rollback", "drop a state") else set()
    number = iter(range(10_000))

    def prepare() -> Path:
        return Path(shutil.copytree(original, tmp_path / str(next(number))))

    def check(root: Path, succeeded: bool) -> None:
        assert _seen(root) == expected["changed" if succeeded else "original"]
        LearnerStore.open(root).verify()
        if not succeeded:
            _write(root, CHANGES[name])
        else:
            _write(root, lambda store: None)  # puts aside what is left over
        assert _seen(root) == expected["changed"]
        LearnerStore.open(root).verify()
        assert content <= set(snapshot(root).values()), "nothing is deleted"
        shutil.rmtree(root)

    count = fail_everywhere(
        prepare, lambda root: _write(root, CHANGES[name]), check, code=code, moment=moment, lasting=lasting
    )
    assert count > 3


def _seen(root: Path) -> Any:
    store = LearnerStore.open(root)
    return store.digest, store.tasks, store.states, store.header


@pytest.mark.parametrize(("code", "moment", "lasting"), MODES)
def test_every_step_of_making_a_learner(code: int, moment: str, lasting: bool, tmp_path: Path) -> None:
    number = iter(range(10_000))

    def check(root: Path, succeeded: bool) -> None:
        assert (root / "learner.json").exists() == succeeded
        if not succeeded:
            LearnerStore.create(root, HEADER).close()
        with LearnerStore.open(root, write=True) as store:
            assert store.header == HEADER
            add_task(store, "a")
            store.verify()

    count = fail_everywhere(
        lambda: tmp_path / str(next(number)) / "learner",
        lambda root: LearnerStore.create(root, HEADER).close(),
        check,
        code=code,
        moment=moment,
        lasting=lasting,
    )
    assert count >= 4


class Learning:
    """A learner of one task, its second task, and what both give without failures."""

    def __init__(self, place: Path, model: Path) -> None:
        self.place, self.model = place, model
        self.number = iter(range(10_000))
        self.rows = [toy_texts(["a", "b"], 4, seed=1), toy_texts(["c", "d"], 4, seed=2)]
        self.original = place / "original"
        toy_learner(self.original, model, "sequential", epochs=1, keep_states="all").learn(self.rows[0], name="one")
        learner = Learner.open(Path(shutil.copytree(self.original, place / "whole")))
        self.before = self.state(learner)
        learner.learn(self.rows[1], name="two")
        self.after = self.state(learner)

    def state(self, learner: Learner) -> Any:
        return learner.digest, [list(one.scores.items()) for one in learner.predict(self.rows[0])]

    def start(self, name: str = "original") -> Learner:
        return Learner.open(Path(shutil.copytree(self.place / name, self.place / str(next(self.number)))))


@pytest.fixture(scope="module")
def learning(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Learning:
    return Learning(tmp_path_factory.mktemp("learning"), tiny_bert)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_every_step_of_learning(code: int, lasting: bool, stride: int, learning: Learning) -> None:
    def check(learner: Learner, succeeded: bool) -> None:
        expected = learning.after if succeeded else learning.before
        assert learning.state(learner) == expected, "the same object goes on"
        assert learning.state(Learner.open(learner.path)) == expected
        if not succeeded:
            learner.learn(learning.rows[1], name="two")
        assert learning.state(Learner.open(learner.path)) == learning.after
        shutil.rmtree(learner.path)

    count = fail_everywhere(
        learning.start,
        lambda learner: learner.learn(learning.rows[1], name="two"),
        check,
        code=code,
        lasting=lasting,
        stride=stride,
    )
    print(f"{count} failing steps of learning")
    assert count > 25 // stride


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", CODES)
def test_every_step_of_rolling_back(code: int, stride: int, learning: Learning) -> None:
    def check(learner: Learner, succeeded: bool) -> None:
        expected = learning.before if succeeded else learning.after
        assert learning.state(Learner.open(learner.path)) == expected
        assert learning.state(learner) == expected
        if not succeeded:
            assert [task.name for task in learner.rollback(1)] == ["two"]
        assert learning.state(learner) == learning.before
        shutil.rmtree(learner.path)

    count = fail_everywhere(
        lambda: learning.start("whole"), lambda learner: learner.rollback(1), check, code=code, stride=stride
    )
    assert count > 15 // stride


@pytest.mark.parametrize("format", ["merged", pytest.param("peft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_every_step_of_an_export(code: int, format: str, learning: Learning, tmp_path: Path) -> None:
    learner, target = learning.start(), tmp_path / "out"
    for survive in range(200):
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(patch, survive, "before", error=lambda: OSError(code, "refused"), lasting=False)
            try:
                learner.export(target, format=format)
            except StoreError:
                assert countdown.struck
            else:
                if not countdown.struck:
                    break
        if target.exists():  # what failed was the clean-up of something else
            shutil.rmtree(target)
        assert learning.state(learner) == learning.before
    assert survive > 3 and learner.export(tmp_path / "again", format=format).max_difference < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}, "nothing half-written is left"
