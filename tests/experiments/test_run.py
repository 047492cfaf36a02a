from __future__ import annotations

import json
import time

import pytest
from filelock import FileLock

from everlora import Learner, run
from everlora.errors import DataError, LockedError, OptionError, StoreError, UnsupportedError
from everlora.experiments.plan import make_plan, row_options
from everlora.experiments.pool import run_jobs
from everlora.experiments.records import RunRecord
from everlora.store import LearnerStore
from everlora.streams import Examples

ROWS = ["inflora", "sequential", "probe", "joint"]


def numbers(results):
    """What must not depend on when, where and in how many pieces it was computed."""
    names = ("method", "seed", "correct", "task_aware", "task_correct", "sizes")
    return [{name: one[name] for name in names} for one in results["runs"]]


@pytest.fixture
def start(recipe_file, network, splits, tmp_path):
    """Run the small recipe into a folder."""

    def go(**changes):
        given = {"data": splits, "model": network, "out": tmp_path / "out", "seeds": [3]} | changes
        return run(recipe_file, **given)

    return go


def test_a_run_from_end_to_end(start, tmp_path, tiny):
    results = start()
    assert [one["method"] for one in results["runs"]] == ROWS
    folder = tmp_path / "out"
    assert json.loads((folder / "results.json").read_text()) == {k: v for k, v in results.items() if k != "folder"}
    assert results["folder"] == str(folder)
    assert "Six colours in three tasks" in (folder / "report.html").read_text()
    assert results["format"] == 1
    assert results["recipe"]["text"] == tiny
    assert results["stream"]["num_tasks"] == 3
    assert results["stream"]["order_seed"] == 3
    assert {"torch", "everlora", "python"} <= set(results["versions"])
    assert results["threads"] == 1
    assert results["published"][0]["last"] == 50.5
    assert results["published"][0]["note"] == "last ± 0.25; made up"
    for one in results["runs"]:
        last = 2 if one["method"] == "joint" else None
        for i, row in enumerate(one["correct"]):
            measured = [cell is not None for cell in row]
            assert measured == ([False] * 3 if last not in (None, i) else [j <= i for j in range(3)])
        assert one["sizes"] == [10, 10, 10]
        assert all(0 <= cell <= 10 for cell in one["correct"][-1])
        assert all(aware >= right for aware, right in zip(one["task_aware"][-1], one["correct"][-1], strict=True))
        assert [sum(row) for row in one["task_confusion"]] == one["sizes"]
        assert [row[j] for j, row in enumerate(one["task_confusion"])] == one["task_correct"][-1]
        assert one["resolved"]["training"]["lr"] == 1e-2 and one["resolved"]["training"]["seed"] == 3
        assert [cost["task"] for cost in one["cost"]] == ([2] if last else [0, 1, 2])
        assert all(cost["seconds"] > 0 and cost["trainable_parameters"] > 0 for cost in one["cost"])
    curves = results["runs"][0]["panels"]["occupied_rank"]
    assert all(len(curve) == 3 for curve in curves.values())


def test_the_counts_are_those_of_the_learner_on_disk(start, tmp_path, splits):
    results = start(methods=["inflora"])
    learner = Learner.open(tmp_path / "out" / "inflora-3" / "learner")
    tasks = results["stream"]["task_labels"]
    test = splits["test"]
    predicted = [one.label for one in learner.predict(test)]
    for index, labels in enumerate(tasks):
        rows = [row for row, label in enumerate(test.labels) if label in labels]
        assert results["runs"][0]["correct"][2][index] == sum(predicted[row] == test.labels[row] for row in rows)


def test_learning_sees_no_test_row_and_tests_follow_their_task(start, monkeypatch, splits):
    events = []
    learn, evaluate = Learner.learn, Learner.evaluate_tasks

    def watched_learn(self, dataset, **options):
        events.append(("learn", {image.tobytes() for image in dataset.inputs}))
        return learn(self, dataset, **options)

    def watched_evaluate(self, tasks):
        events.append(("test", [index for index, _ in tasks]))
        return evaluate(self, tasks)

    monkeypatch.setattr(Learner, "learn", watched_learn)
    monkeypatch.setattr(Learner, "evaluate_tasks", watched_evaluate)
    start(methods=["probe", "joint"])
    tests = {image.tobytes() for image in splits["test"].inputs}
    assert [event for event, _ in events] == ["learn", "test"] * 3 + ["learn", "test"]
    assert [seen for event, seen in events if event == "test"] == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert not any(seen & tests for event, seen in events if event == "learn")
    assert len(events[6][1]) == len(splits["train"])  # joint: everything at once


@pytest.mark.parametrize("moment", ["while learning", "before measuring"])
def test_an_interrupted_run_goes_on_after_its_last_task(start, monkeypatch, moment, tmp_path):
    whole = start(out=tmp_path / "whole", methods=["inflora"])
    calls = []

    def stop_at_the_second(function):
        def wrapped(self, *given, **options):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return function(self, *given, **options)

        return wrapped

    owner, name = (LearnerStore, "write_task") if moment == "while learning" else (RunRecord, "append")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at_the_second(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            start(methods=["inflora"])
    record = json.loads((tmp_path / "out" / "inflora-3" / "run.json").read_text())
    assert record["rows_done"] == 1
    assert not (tmp_path / "out" / "results.json").exists()
    assert numbers(start(methods=["inflora"])) == numbers(whole)


@pytest.mark.slow
def test_rows_and_seeds_can_be_added_to_a_folder_and_finished_ones_are_kept(start, monkeypatch):
    first = start(methods=["probe"])
    learned = []
    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, *a, **k: learned.append(1) or learn(self, *a, **k))
    assert numbers(start(methods=["probe"])) == numbers(first)
    assert learned == []
    more = start(methods=["probe", "sequential"], seeds=[3, 4])
    assert len(learned) == 9
    assert [(one["method"], one["seed"]) for one in more["runs"]] == [
        ("sequential", 3),
        ("sequential", 4),
        ("probe", 3),
        ("probe", 4),
    ]
    assert more["seeds"] == [3, 4]
    assert more["stream"]["order_seed"] == "the run's seed"
    assert numbers(first)[0] in numbers(more)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"epochs": 3}}, "another options"),
        ({"setting": "short"}, "another setting"),
        ({"data": "changed"}, "another state of the data"),
    ],
)
def test_a_folder_keeps_to_one_configuration(start, splits, changes, words):
    start(methods=["probe"])
    if changes.get("data"):
        changes = {"data": {"train": splits["train"], "test": splits["test"].select(range(6))}}
    with pytest.raises(OptionError, match=words):
        start(methods=["probe"], **changes)


def test_a_seed_of_other_data_does_not_stand_beside_the_first(start, splits, tmp_path):
    results = start(methods=["probe"])
    train = splits["train"]
    turned = Examples("image", train.inputs, train.labels[::-1].copy(), train.ids, class_names=train.class_names)
    with pytest.raises(OptionError, match="another state of the data"):
        start(methods=["probe"], seeds=[4], data={**splits, "train": turned})
    assert results["data_hash"] == json.loads((tmp_path / "out" / "plan.json").read_text())["data_hash"]
    assert (
        start(methods=["probe"], out=tmp_path / "other", data={**splits, "train": turned})["data_hash"]
        != (results["data_hash"])
    )


def test_options_that_json_writes_otherwise_are_those_of_before(start):
    given = {"methods": ["inflora"], "options": {"targets": ("q_proj",)}}
    assert numbers(start(**given)) == numbers(start(**given))


def test_a_recipe_may_not_fix_the_seed(recipe_file, tiny):
    for place, text in (
        ("recipe", tiny.replace("lr: 1e-2,", "lr: 1e-2, seed: 5,")),
        ("setting", tiny.replace("training: {epochs: 2}", "training: {epochs: 2, seed: 5}")),
        ("row inflora", tiny.replace("set: {rank: 2}", "set: {rank: 2, seed: 5}")),
    ):
        assert text != tiny
        with pytest.raises(OptionError, match=f"{place} may not set 'seed'"):
            make_plan(text, file="tiny", setting="short", model="m")


def test_a_stream_by_class_keeps_its_scenario(recipe_file, tiny, network, splits, tmp_path):
    recipe_file.write_text(tiny.replace("  by: class\n", "  by: class\n  scenario: task_incremental\n"))
    results = run(recipe_file, data=splits, model=network, out=tmp_path / "out", seeds=[3], methods=["probe"])
    assert results["stream"]["scenario"] == "task_incremental"
    assert results["runs"][0]["correct"] == results["runs"][0]["task_aware"]


def test_a_folder_of_something_else_is_left_alone(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    with pytest.raises(OptionError, match=r"not empty and holds no results.*--out"):
        start()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_a_learner_and_a_record_that_do_not_fit_are_noticed(start, tmp_path):
    start(methods=["probe"])
    (tmp_path / "out" / "probe-3" / "run.json").unlink()
    with pytest.raises(StoreError, match=r"holds 3 tasks and .* 0 measured ones"):
        start(methods=["probe"])


def test_a_damaged_record_is_refused(start, tmp_path):
    start(methods=["probe"])
    file = tmp_path / "out" / "probe-3" / "run.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"run\.json is not valid JSON"):
        start(methods=["probe"])


def test_options_reach_the_rows_that_know_them(recipe_file, tiny):
    def options(row, setting="standard", **given):
        plan = make_plan(tiny, file="tiny", setting=setting, methods=["inflora", "probe"], model="m", options=given)
        return row_options(plan, row, 7, 3)

    assert options("inflora")["total_tasks"] == 3
    assert options("inflora", total_tasks=9)["total_tasks"] == 9
    assert "total_tasks" not in options("probe")
    assert options("inflora")["rank"] == 2
    assert options("inflora", threshold_start=0.5)["threshold_start"] == 0.5
    assert "threshold_start" not in options("probe", threshold_start=0.5)
    assert options("probe", epochs=9)["epochs"] == 9
    assert options("probe", setting="short")["epochs"] == 2
    assert options("probe")["seed"] == 7
    with pytest.raises(OptionError, match=r"options given may not set 'seed'.*--seeds"):
        options("probe", seed=1)


def test_a_rows_own_options_win_over_the_settings(tiny):
    plan = make_plan(tiny, file="tiny", setting="short", model="m")
    assert plan.rows == ("inflora",)
    assert row_options(plan, "inflora", 7, 3)["rank"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["sequentail"]}, "no row 'sequentail'.*did you mean 'sequential'"),
        ({"methods": []}, "no methods or no seeds"),
        ({"setting": "ful"}, "no setting 'ful'"),
        ({"options": {"rnak": 1}}, "'rnak'.*did you mean 'rank'"),
        ({"options": {"epochs": 0}}, "epochs"),
        (
            {"methods": ["probe"], "options": {"projection": False}},
            "No row of this run has the option 'projection'.*inflora",
        ),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_written(start, tmp_path, changes, words):
    with pytest.raises(OptionError, match=words):
        start(**changes)
    assert not (tmp_path / "out").exists()


def test_any_registered_method_is_a_row(start):
    results = start(methods=["head-only", "ncm"])
    assert [one["method"] for one in results["runs"]] == ["probe", "ncm"]


def test_data_in_memory_cannot_leave_the_process(start):
    with pytest.raises(UnsupportedError, match="one worker"):
        start(workers=2)


def test_bad_data_is_reported_before_anything_is_learned(start, splits):
    with pytest.raises(DataError):
        start(data={"train": splits["train"].select(range(0)), "test": splits["test"]})


def test_progress_counts_the_tasks_of_each_row(start):
    seen = []
    start(methods=["probe"], progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "probe, seed 3"] == [("probe, seed 3", i, 3) for i in range(4)]


def test_the_default_folder_is_named_after_the_recipe(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = start(out=None, methods=["probe"])["folder"]
    assert folder.startswith("runs/tiny-")
    assert (tmp_path / folder / "results.json").exists()


@pytest.mark.slow
def test_two_workers_give_the_numbers_of_one_process(start, tmp_path):
    given = {"data": None, "setting": "short", "methods": ["inflora", "probe", "joint"], "seeds": [3, 4]}
    seen = []
    alone = start(out=tmp_path / "alone", **given)
    together = start(out=tmp_path / "together", workers=2, progress=lambda *step: seen.append(step), **given)
    assert numbers(together) == numbers(alone)
    assert together["threads"] == 1
    assert ("InfLoRA, seed 4", 5, 5) in seen


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_callers_error(start, tmp_path):
    given = {"data": None, "setting": "short", "workers": 2, "methods": ["probe"], "seeds": [3, 4]}
    start(**given)
    file = tmp_path / "out" / "probe-4" / "run.json"
    file.write_text("{}")
    with pytest.raises(OptionError, match=r"probe-4.*results of other options"):
        start(**given)


def test_the_same_row_and_seed_run_once_at_a_time(start, tmp_path):
    start(methods=["probe"])
    with FileLock(tmp_path / "out" / "probe-3" / ".lock"), pytest.raises(LockedError, match="another process"):
        start(methods=["probe"])
    assert len(start(methods=["probe"])["runs"]) == 1


def test_a_plan_that_was_being_written_at_a_kill_is_no_obstacle(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".plan.json.tmp-0a1b2c3d").write_text("{")
    assert start(methods=["probe"])["runs"]


def test_a_worker_that_dies_between_jobs_says_why(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import json, sys\nsys.stdin.readline()\nprint(json.dumps({'kind': 'done'}), flush=True)\n"
        "sys.stderr.write('out of memory')\nsys.exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs, slow = [(name, 1) for name in "abcdef"], lambda *_: time.sleep(0.5)
    with pytest.raises(RuntimeError, match="ended with code 3: out of memory"):
        run_jobs(tmp_path / "plan.json", jobs, workers=2, progress=slow, module="dying")
