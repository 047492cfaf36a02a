"""A sweep sees training rows only, goes on where it was, and says what is best."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlora.cli import main
from everlora.errors import DataError, NumericError, OptionError, StoreError, UnsupportedError
from everlora.learner import Learner
from everlora.report.sweep import best_lines, markdown_table
from everlora.streams import Examples
from everlora.sweep import sweep
from tests.experiments.conftest import coloured, network, one_thread, recipe_file
from tests.training.courses import Course, Killed

__all__ = ["network", "one_thread", "recipe_file"]


class Untouchable(Mapping[str, Any]):
    """Splits of which only the training rows may be looked up."""

    def __init__(self, train: Examples) -> None:
        self._train = train

    def __getitem__(self, name: str) -> Examples:
        assert name == "train", f"the {name} split was looked up"
        return self._train

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the splits were gone through")

    def __len__(self) -> int:
        return 2

    def __contains__(self, name: object) -> bool:
        return name in ("train", "test")


@pytest.fixture
def train() -> Examples:
    return coloured(10, seed=1)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No trial learns; its value is its learning rate, and those tried are counted."""
    tried: list[float] = []

    def execute(plan: Any, row: str, seed: int, **_: Any) -> dict[str, Any]:
        tried.append(plan.options["lr"])
        return {"options": dict(plan.options), "cost": []}

    monkeypatch.setattr("everlora.sweep.trial.execute", execute)
    monkeypatch.setattr("everlora.sweep.trial.value_of", lambda record, metric: record["options"]["lr"])
    return tried


@pytest.fixture
def start(recipe_file: Path, network: Path, train: Examples, tmp_path: Path) -> Any:
    def go(out: str = "out", space: Any = None, **changes: Any) -> dict[str, Any]:
        given = {"data": {"train": train}, "model": network, "methods": ["inflora"], **changes}
        return sweep(recipe_file, space or {"lr": [1e-3, 1e-2]}, out=tmp_path / out, **given)

    return go


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Examples]]:
    """All rows that learners learn from and are measured on."""
    rows: dict[str, list[Examples]] = {"learned": [], "judged": []}
    learn, evaluate = Learner.learn, Learner.evaluate_tasks
    monkeypatch.setattr(
        Learner, "learn", lambda self, given, **more: rows["learned"].append(given) or learn(self, given, **more)
    )
    monkeypatch.setattr(
        Learner,
        "evaluate_tasks",
        lambda self, tasks, **more: rows["judged"].extend(part for _, part in tasks) or evaluate(self, tasks, **more),
    )
    return rows


def _images(parts: list[Examples]) -> set[bytes]:
    return {np.asarray(image).tobytes() for part in parts for image in part.inputs}


@pytest.mark.parametrize("validation", [None, 0.3])
def test_only_training_rows_are_learned_and_judged_by(
    start: Any, train: Examples, seen: dict[str, list[Examples]], validation: float | None
) -> None:
    results = start(data=Untouchable(train), space={"lr": [1e-2]}, validation=validation)
    assert results["first_task"] == (validation is None) and results["best"]["inflora"]["mean"] is not None
    assert [len(rows.classes) for rows in seen["learned"]] == ([2] if validation is None else [2, 2, 2])
    learned, judged = _images(seen["learned"]), _images(seen["judged"])
    assert judged and not learned & judged, "what is judged by is not learned from"
    assert learned | judged <= _images([train])
    share = len(seen["judged"][0]) / (len(seen["judged"][0]) + len(seen["learned"][0]))
    assert share == pytest.approx(0.2 if validation is None else 0.3)


@pytest.mark.slow
def test_a_test_set_made_of_the_only_split_is_set_apart_as_in_a_run(
    start: Any, recipe_file: Path, train: Examples, seen: dict[str, list[Examples]]
) -> None:
    from everlora.experiments.data import read_splits
    from everlora.experiments.recipe import load_recipe

    text = recipe_file.read_text().replace("  builtin: sklearn:digits", "  hub: some/where\n  test_fraction: 0.4")
    recipe_file.write_text(text)
    splits, _ = read_splits(load_recipe(recipe_file).data, {"train": train}, recipe="tiny")
    start(space={"lr": [1e-2]}, validation=0.25)
    used = _images(seen["learned"]) | _images(seen["judged"])
    assert used == _images([splits["train"]]) and not used & _images([splits["test"]])


@pytest.mark.slow
def test_every_setting_has_its_values_and_the_best_is_ready_to_run(start: Any, tmp_path: Path) -> None:
    space = {"lr": [1e-6, 3e-2], "projection": "true,false"}
    results = start(space=space, methods=["inflora", "probe"], seeds=[3, 4])
    trials = results["trials"]
    assert [trial["options"] for trial in trials if trial["row"] == "probe"] == [{"lr": 1e-6}, {"lr": 3e-2}]
    assert len(trials) == 6, "two of a row that has no projection"
    assert all(set(trial["values"]) == {"3", "4"} for trial in trials)
    for trial in trials:
        values = list(trial["values"].values())
        assert trial["mean"] == pytest.approx(np.mean(values)) and trial["deviation"] == pytest.approx(
            np.std(values, ddof=1)
        )
    best = results["best"]["inflora"]
    assert best["mean"] == max(trial["mean"] for trial in trials if trial["row"] == "inflora")
    word = json.dumps(best["options"]["projection"])
    assert best["set"] == f"--set lr={best['options']['lr']} --set projection={word}"
    folder = tmp_path / "out"
    assert json.loads((folder / "sweep.json").read_text())["trials"] == trials
    assert (folder / "sweep.md").read_text() == markdown_table(results)
    assert not list(folder.rglob("learner")), "only numbers are kept"


def test_an_interrupted_sweep_goes_on_within_its_task(start: Any, tmp_path: Path) -> None:
    options = {"options": {"checkpoint_every": "1"}}
    whole = start("whole", **options)
    with Course(places=[("train", 3, "after")])._armed(), pytest.raises(Killed):
        start("parts", **options)  # two steps a trial: the second trial is cut off
    assert list(tmp_path.glob("parts/trials/*/*/learner/checkpoint/*")) and not (tmp_path / "parts/sweep.json").exists()
    course = Course(places=[])
    with course._armed():
        parts = start("parts", **options)
    assert course.steps == 1, "the first trial is not learned again, the second goes on"
    assert [trial["values"] for trial in parts["trials"]] == [trial["values"] for trial in whole["trials"]]


def test_more_values_are_added_and_other_sweeps_refused(start: Any, untrained: list[float], train: Examples) -> None:
    start()
    results = start(space={"lr": [1e-2, 1e-1]})
    assert untrained == [1e-3, 1e-2, 1e-1]
    assert [trial["options"]["lr"] for trial in results["trials"]] == [1e-3, 1e-2, 1e-1]
    with pytest.raises(OptionError, match="another choice of tasks"):
        start(validation=0.2)
    with pytest.raises(OptionError, match="another options"):
        start(options={"epochs": 2})
    turned = Examples(train.modality, train.inputs, train.labels[::-1].copy(), train.ids, class_names=train.class_names)
    with pytest.raises(OptionError, match="another state of the data"):
        start(data={"train": turned})
    assert len(untrained) == 3


def test_values_that_json_writes_otherwise_are_gone_on_with(start: Any, untrained: list[float]) -> None:
    given = {"options": {"targets": ("q_proj",)}, "space": {"lr": [1e-3]}}
    assert start(**given)["trials"] == start(**given)["trials"]
    assert untrained == [1e-3]


def test_of_ties_the_first_of_all_calls_is_named(
    start: Any, untrained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everlora.sweep.trial.value_of", lambda record, _: 1.0)
    start(space={"lr": [1e-3]})
    found = start(space={"lr": [1e-2, 1e-3, 1e-1]})
    assert untrained == [1e-3, 1e-2, 1e-1]
    assert found["best"]["inflora"]["options"] == {"lr": 1e-3}
    assert start(space={"lr": [1e-1]})["best"]["inflora"]["options"] == {"lr": 1e-3}


def test_a_setting_that_fails_is_a_result_and_only_divergence_is_final(
    start: Any, untrained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from everlora.sweep import trial

    execute, error = trial.execute, [NumericError("the loss is not finite")]

    def fail(plan: Any, *given: Any, **more: Any) -> Any:
        found = execute(plan, *given, **more)
        if plan.options["lr"] == 1e-2:
            raise error[0]
        return found

    monkeypatch.setattr(trial, "execute", fail)
    for _ in range(2):
        results = start()
        assert [one["mean"] for one in results["trials"]] == [1e-3, None]
        assert any("no value, because the loss is not finite" in line for line in best_lines(results))
    assert untrained == [1e-3, 1e-2], "neither is tried again"
    error[0] = DataError("no rows")
    for _ in range(2):
        start("other")
    assert untrained[2:] == [1e-3, 1e-2, 1e-2]
    with pytest.raises(OptionError, match="No setting of the sweep could be judged; the first: no rows"):
        start("third", space={"lr": [1e-2]})
    error[0] = StoreError("damaged")
    with pytest.raises(StoreError):
        start("fourth")


def test_ties_and_edges_are_said(start: Any, untrained: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {1e-3: 0.5, 1e-2: 0.75, 1e-1: 0.5}
    monkeypatch.setattr("everlora.sweep.trial.value_of", lambda record, _: values.get(record["options"]["lr"], 0.1))
    inner = start(space={"lr": [1e-3, 1e-2, 1e-1]})["best"]["inflora"]
    assert (inner["options"], inner["ties"], inner["edges"]) == ({"lr": 1e-2}, [], [])
    edge = start("edge", space={"lr": [1e-3, 1e-2]})["best"]["inflora"]
    assert edge["edges"] == ["lr=0.01 is the largest that was tried: try larger ones too"]
    tied = start("tied", space={"lr": [1e-3, 1e-1]})
    assert len(tied["best"]["inflora"]["ties"]) == 1 and tied["best"]["inflora"]["edges"] == []
    assert any("1 other setting did exactly as well" in line for line in best_lines(tied))
    drawn = start("drawn", space={"lr": "log:1e-4..1e-1"}, random=3, options={"epochs": 2})
    assert set(untrained[-3:]) == {one["options"]["lr"] for one in drawn["trials"]}


def test_the_methods_are_told_the_whole_number_of_tasks(start: Any, untrained: list[float], monkeypatch: Any) -> None:
    from everlora.sweep import trial

    seen = []
    execute = trial.execute
    monkeypatch.setattr(trial, "execute", lambda plan, *a, **k: seen.append(plan.options) or execute(plan, *a, **k))
    start(space={"lr": [1e-2]})
    assert seen[0]["total_tasks"] == 3, "as in a run, though one task is learned"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"space": {"lrr": [1]}}, OptionError, "did you mean 'lr'"),
        ({"space": {"rank": [0, 2]}}, OptionError, "rank"),
        ({"space": {"projection": [True]}, "methods": ["probe"]}, OptionError, "belongs to"),
        ({"methods": ["inflorra"]}, OptionError, "did you mean 'inflora'"),
        ({"validation": 1.0}, OptionError, "between 0 and 1"),
        ({"metric": "lst"}, OptionError, "did you mean 'last'"),
        ({"backend": "rya"}, OptionError, "did you mean 'ray'"),
        ({"options": {"lr": 1}}, OptionError, "both set and tried"),
        ({"workers": 2}, UnsupportedError, "one worker"),
        ({"methods": []}, OptionError, "at least one method"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(
    start: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        start(**changes)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(
    recipe_file: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(recipe_file), "--methods", "probe", "--model", str(network), "--out", str(tmp_path / "out")]
    assert main([*words, "--grid", "lrr=1e-3"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err
    assert (
        main([*words, "--grid", "lr"]) == 2
        and main([*words, "--grid", "lr=1", "--first-task", "--validation", "0.1"]) == 2
    )
    capsys.readouterr()
    assert main([*words, "--grid", "lr=log:1e-3..1e-1", "--random", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "first task, judged by 20% of the training rows" in shown
        and f"everlora run {recipe_file} --methods probe" in shown
    )
    assert main([*words, "--grid", "lr=log:1e-3..1e-1", "--random", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["random"] == 1


@pytest.mark.slow
def test_two_processes_find_what_one_finds(recipe_file: Path, network: Path, tmp_path: Path) -> None:
    given = {"methods": ["inflora"], "model": network, "options": {"max_steps": 5}}
    one, two = (
        sweep(recipe_file, {"lr": [1e-3, 1e-2]}, out=tmp_path / str(workers), workers=workers, **given)
        for workers in (1, 2)
    )
    assert [trial["values"] for trial in one["trials"]] == [trial["values"] for trial in two["trials"]]


@pytest.mark.slow
def test_ray_tune_finds_what_one_process_finds(recipe_file: Path, network: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray Tune is not installed (the extra 'ray')")
    given = {"methods": ["probe"], "model": network}
    one, two = (
        sweep(recipe_file, {"lr": [1e-3, 1e-2]}, out=tmp_path / backend, backend=backend, **given)
        for backend in ("local", "ray")
    )
    assert [trial["values"] for trial in one["trials"]] == [trial["values"] for trial in two["trials"]]


def test_without_ray_one_is_told_how_to_get_it(
    recipe_file: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UnsupportedError, match="extra 'ray'"):
        sweep(recipe_file, {"lr": [1e-3]}, methods=["probe"], model=network, out=tmp_path / "out", backend="ray")
