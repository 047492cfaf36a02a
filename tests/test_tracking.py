"""Trackers: TensorBoard for real, read back from its file; the others by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner, run
from everlora.errors import OptionError
from everlora.results import TaskResult
from everlora.tracking import TRACKERS, Trackers, check_trackers
from tests.experiments.conftest import TINY, coloured, network  # noqa: F401  a fixture

# TensorBoard and the protocol buffers below it use calls that Python and NumPy advise against.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, of the one run that a folder holds."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def result(index: int, steps: int) -> TaskResult:
    return TaskResult(index, f"part{index}", ("a",), ("a",), (), 40, 0, 2.5, steps, {"part0": 0.75})


@pytest.mark.slow
def test_tensorboard_holds_what_training_logged(tmp_path: Path, network: Path) -> None:  # noqa: F811
    learner = Learner.create(
        tmp_path / "mine", model=network, method="sequential", rank=2, epochs=2, batch_size=10, augment="none", lr=1e-3
    )
    rows = coloured(10, seed=1)
    pairs = ("amber blue", "cyan denim")
    tasks = [rows.select([i for i in range(len(rows)) if rows.labels[i] in names]) for names in pairs]
    with Trackers("tensorboard", name="one", folder=tmp_path / "logs", every=1) as trackers:
        done = [learner.learn(task, validation=task, watch=trackers) for task in tasks]
    found = curves(tmp_path / "logs" / "one")
    total = sum(one.steps for one in done)
    assert [step for step, _ in found["train/loss"]] == list(range(1, total + 1))
    log = learner._store.read_task(1).log()
    assert [value for _, value in found["train/epoch loss"][-2:]] == pytest.approx([row["loss"] for row in log])
    assert found["train/lr"][0][1] == pytest.approx(1e-3)
    assert [step for step, _ in found["task/seconds"]] == [done[0].steps, total]
    assert found["task/seconds"][1][1] == pytest.approx(done[1].seconds, rel=1e-5)
    name = done[0].name
    assert [value for _, value in found[f"kept rows/{name}"]] == pytest.approx([one.metrics[name] for one in done])


@pytest.mark.slow
def test_a_run_is_tracked_by_row_and_seed(tmp_path: Path, network: Path) -> None:  # noqa: F811
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY, encoding="utf-8")
    splits = {"train": coloured(10, seed=1), "test": coloured(5, seed=2)}
    out = tmp_path / "out"
    results = run(
        recipe, data=splits, model=network, out=out, seeds=[3], methods=["inflora", "joint"], track="tensorboard"
    )
    assert sorted(path.name for path in (out / "tracking").iterdir()) == ["tiny-inflora-3", "tiny-joint-3"]
    found = curves(out / "tracking" / "tiny-inflora-3")
    first = results["runs"][0]
    assert [value for _, value in found["accuracy/task-01"]] == pytest.approx([row[0] / 10 for row in first["correct"]])
    steps = [cost["steps"] for cost in first["cost"]]
    assert [step for step, _ in found["accuracy/mean of tasks"]] == [sum(steps[: n + 1]) for n in range(3)]
    assert found["task/number"][-1] == (sum(steps), 3.0)


def test_steps_go_on_over_tasks_and_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, dict[str, float]]] = []

    class Fake:
        def log(self, values: dict[str, float], step: int) -> None:
            written.append((step, values))

        def finish(self) -> None:
            written.append((-1, {}))

    monkeypatch.setattr(Trackers, "_open", lambda self: [Fake()])
    with Trackers([], steps=100, every=4) as trackers:
        for step in range(1, 10):
            trackers.step(step, {"loss": float(step)})
        trackers.task(result(0, 9))
        trackers.step(1, {"loss": 0.5})
        trackers.step(3, {"epoch": 1.0})
        trackers.figures({"accuracy/mean": 0.5})
        trackers.figures({})
    assert [step for step, _ in written] == [101, 104, 108, 109, 109, 110, 112, 112, -1]
    assert written[3][1] == {"task/number": 1.0, "task/seconds": 2.5, "task/rows": 40.0}
    assert written[4][1] == {"kept rows/part0": 0.75}
    with pytest.raises(OptionError, match="1 or more"):
        Trackers([], every=0)


def test_names_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_what_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    assert check_trackers(" TensorBoard,,tensorboard ") == ("tensorboard",)
    assert check_trackers("") == check_trackers([]) == ()
    with pytest.raises(OptionError, match=r"'comet_ml' needs a package .* pip install 'comet-ml'"):
        check_trackers("tensorboard,comet-ml")
    with pytest.raises(OptionError, match=r"no tracker 'tensorbord'.*tensorboard"):
        check_trackers("tensorbord")


def test_a_missing_tracker_ends_a_run_before_it_begins(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    from everlora.cli import main

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert main(["run", "digits", "--track", "wandb", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'wandb'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_tracker_is_imported_unasked() -> None:
    code = "import sys, everlora.learner, everlora.experiments, everlora.tracking as t; t.check_trackers('');"
    code += "sys.exit(any(n in sys.modules for n in ('tensorboard', 'accelerate.tracking', 'wandb', 'mlflow')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
