"""Recipes of language models: what is measured at which moment, and that an interruption changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlora import Learner, run
from everlora.errors import DataError, OptionError
from everlora.experiments.execution import execute
from everlora.experiments.language_data import first_bytes, hold_out_texts
from everlora.experiments.plan import Streams, make_plan, row_options
from everlora.experiments.recipe import load_recipe, parse_recipe
from everlora.experiments.records import RunRecord
from everlora.experiments.sources import given_part
from everlora.language import LanguageEvaluator
from everlora.report.language import language_values
from everlora.streams import Examples, by_datasets, load_dialogues, parse_row
from tests.language.builders import save_model

RECIPE = """\
name: tongues
title: Three small tongues
status: runs-here
description: Small enough for a test.
data:
  sets:
    - {name: vowels, shared: vowels}
    - {name: digits, shared: digits}
    - {name: marks, shared: marks}
stream: {by: datasets, scenario: language}
model: [nowhere]
backbone: {block_size: 16, max_length: 32}
training: {max_steps: 3, batch_size: 4, optimizer: adamw, lr: 1e-2, lr_schedule: constant}
methods:
  double: {method: i_lora, label: Double, set: {rank: 2, ema_horizon: 0.5, ilora_buffer_size: 6}}
  fast: {method: i_lora, label: Fast, weights: [plastic], ablation: true, set: {rank: 2}}
  recall: {method: i_lora, own_texts: 4, set: {rank: 2, ilora_buffer_size: 8, buffer_policy: balanced}}
  odd: {method: sequential, weights: [plastic], set: {rank: 2}}
  replay: {method: replay, label: Replay, set: {rank: 2, size: 6}}
  sequential: {method: sequential, label: Sequential, set: {rank: 2}}
  joint: {method: joint, label: Joint, set: {rank: 2}}
default_methods: [sequential]
seeds: [3]
table: language
retention: {samples: 4, max_tokens: 12, seed: 5}
samples: {prompts: ["ae", {instruction: "1"}], max_new_tokens: 3}
settings:
  standard: {}
  cut: {subsample: {train_bytes: 120, test_bytes: 40, test: 2}}
  validation: {evaluate_on: validation, samples: {prompts: [a], max_new_tokens: 2}}
"""
ALPHABETS = {"vowels": "aeiou ", "digits": "123 ", "marks": ".,;! "}


def texts(alphabet: str, rows: int, seed: int) -> list[str]:
    random = np.random.RandomState(seed)
    return ["".join(random.choice(list(alphabet), size=30)) for _ in range(rows)]


def data() -> dict[str, Any]:
    """Training and test rows of each data set, in memory."""
    return {name: {"train": texts(kind, 8, 1), "test": texts(kind, 3, 2)} for name, kind in ALPHABETS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model: Path, tmp_path: Path):
    """Run the small recipe into a folder."""
    file = tmp_path / "tongues.yaml"
    file.write_text(RECIPE, encoding="utf-8")

    def go(**changes: Any) -> dict[str, Any]:
        given = {"data": data(), "model": model, "out": tmp_path / "out", "methods": ["sequential"]} | changes
        return run(file, **given)

    return go


def measured(results: dict[str, Any]) -> list[Any]:
    """What must not depend on when and in how many pieces it was computed."""
    return [(one["method"], one["seed"], one["language"], one["panels"]) for one in results["runs"]]


def test_every_domain_is_measured_before_the_first_task_and_after_each(start, tmp_path) -> None:
    results = start(methods=["sequential", "double"])
    sequential, double = sorted(results["runs"], key=lambda one: one["label"], reverse=True)
    known = sequential["language"]
    assert known["domains"] == list(ALPHABETS)
    assert len(known["base"]["tests"]) == 3 and len(known["stages"]) == 3
    assert [stage["task"] for stage in known["stages"]] == [0, 1, 2]
    assert all(len(one["tests"]) == 3 for stage in known["stages"] for one in stage["measured"])
    assert all(len(one["samples"]) == 2 for stage in known["stages"] for one in stage["measured"])
    assert known["base"]["retention"]["tokens"] == known["stages"][0]["measured"][0]["retention"]["tokens"]
    assert double["language"]["base"] == known["base"]
    variants = [one["variant"] for one in double["language"]["stages"][-1]["measured"]]
    assert variants == ["stable", "plastic"]
    stable, plastic = double["language"]["stages"][-1]["measured"]
    assert stable["tests"] != plastic["tests"]
    assert double["panels"]["buffer_bytes"] and max(double["panels"]["buffer_rows"]["task 0"]) <= 6
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {
        k: v for k, v in results.items() if k != "folder"
    }
    page = (tmp_path / "out" / "report.html").read_text()
    for figures in (language_values(results)["sequential"][3], language_values(results)["double/plastic"][3]):
        assert f"{figures['ce']:.3f}" in page and f"{figures['retention']:.3f}" in page


@pytest.mark.slow
def test_the_scores_are_those_of_the_learner_on_disk(start, tmp_path) -> None:
    results = start(methods=["double"])
    learner = Learner.open(tmp_path / "out" / "double-3" / "learner")
    tests = [(task, load_dialogues(data()[name]["test"])) for task, name in enumerate(ALPHABETS)]
    for one in results["runs"][0]["language"]["stages"][-1]["measured"]:
        again = learner.evaluate_tasks(tests, variant=one["variant"])
        assert [cell["nll"] for cell in one["tests"]] == pytest.approx([score.nll for score in again])
        written = learner.generate([{"text": "ae"}, {"instruction": "1"}], max_new_tokens=3, variant=one["variant"])
        assert one["samples"] == written


def test_own_texts_are_kept_in_the_folder_and_cost_the_pretrained_model_least_on_average(start, tmp_path) -> None:
    results = start(methods=["sequential", "joint"])
    assert len(list((tmp_path / "out").glob("retention-*.safetensors"))) == 1
    tokens = {one["language"]["base"]["retention"]["nll"] for one in results["runs"]}
    assert len(tokens) == 1
    moved = [language_values(results)[row][3]["retention"] for row in ("sequential", "joint")]
    assert all(value != 0 for value in moved)


def test_a_row_that_learns_all_at_once_gets_the_steps_of_all_tasks_and_is_measured_once(start) -> None:
    joint = start(methods=["joint"])["runs"][0]
    assert [entry["steps"] for entry in joint["cost"]] == [9]
    assert [stage["task"] for stage in joint["language"]["stages"]] == [2]


def test_a_row_may_measure_some_of_its_weights(start) -> None:
    results = start(methods=["fast"])
    assert [one["variant"] for one in results["runs"][0]["language"]["stages"][0]["measured"]] == ["plastic"]
    assert results["rows"]["fast"]["ablation"] is True
    assert set(language_values(results)) == {"fast", "fast/plastic"}
    with pytest.raises(OptionError, match="has one choice only"):
        start(methods=["odd"])


@pytest.mark.slow
def test_texts_of_the_pretrained_model_enter_the_memory_before_the_first_task(start, tmp_path) -> None:
    results = start(methods=["recall", "double"])
    recall = next(one for one in results["runs"] if one["method"] == "recall")
    assert [stage["task"] for stage in recall["language"]["stages"]] == [0, 1, 2]
    assert [entry["task"] for entry in recall["cost"]] == [0, 1, 2]
    assert [entry["steps"] for entry in recall["cost"]] == [3, 3, 3]
    rows = recall["panels"]["buffer_rows"]
    assert set(rows) == {"own texts", "task 0", "task 1", "task 2"}
    assert rows["own texts"][0] > 0 and rows["task 0"][0] > 0
    learner = Learner.open(tmp_path / "out" / "recall-3" / "learner")
    assert [entry.name for entry in learner.tasks] == ["own-texts", *ALPHABETS]
    assert len(list((tmp_path / "out").glob("retention-*.safetensors"))) == 2


@pytest.mark.parametrize(
    "moment", [pytest.param("before the first task", marks=pytest.mark.slow), "while learning", "before writing"]
)
@pytest.mark.parametrize("row", [pytest.param("recall", marks=pytest.mark.slow), "replay"])
def test_an_interrupted_run_ends_with_the_same_record(start, monkeypatch, tmp_path, moment, row) -> None:
    whole = start(out=tmp_path / "whole", methods=[row])
    calls = []

    def stop_at_the_second(function):
        def wrapped(self, *given, **options):
            calls.append(1)
            if len(calls) == (1 if moment == "before the first task" else 2):
                raise KeyboardInterrupt
            return function(self, *given, **options)

        return wrapped

    owner, name = (RunRecord, "append") if moment == "before writing" else (Learner, "learn")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at_the_second(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            start(methods=[row])
    record = json.loads((tmp_path / "out" / f"{row}-3" / "run.json").read_text())
    learned_own_texts_first = row == "recall" and moment == "while learning"
    assert record["rows_done"] == (0 if moment == "before the first task" or learned_own_texts_first else 1)
    assert record["language"]["base"] is not None
    assert measured(start(methods=[row])) == measured(whole)


def test_the_pretrained_model_is_measured_once(start, monkeypatch) -> None:
    scored = []
    evaluate = Learner.evaluate_tasks
    monkeypatch.setattr(
        Learner, "evaluate_tasks", lambda self, *a, **k: scored.append(len(self.tasks)) or evaluate(self, *a, **k)
    )
    start()
    assert scored == [0, 1, 2, 3]
    start()
    assert scored == [0, 1, 2, 3]


def test_learning_sees_no_test_row(start, monkeypatch) -> None:
    seen = []
    learn = Learner.learn
    monkeypatch.setattr(
        Learner, "learn", lambda self, rows, **k: seen.append(set(rows.inputs)) or learn(self, rows, **k)
    )
    start(methods=["sequential", "joint"])
    tests = {row for parts in data().values() for row in load_dialogues(parts["test"]).inputs}
    assert len(seen) == 4 and not any(rows & tests for rows in seen)


def test_validation_rows_are_training_rows_that_are_not_trained_on(start, model) -> None:
    plan = make_plan(RECIPE, file="tongues", setting="validation", model=model, data=data())
    for task in Streams(plan)(3).tasks:
        given = [parse_row(row)["text"] for row in load_dialogues(data()[task.name]["train"]).inputs]
        kept, held = ([parse_row(row)["text"] for row in part.inputs] for part in (task.train, task.test))
        assert [first + second for first, second in zip(kept, held, strict=True)] == given
    results = start(setting="validation")
    assert results["runs"][0]["language"]["prompts"] == [{"text": "a"}]


def test_a_setting_uses_so_many_bytes_and_rows(model) -> None:
    plan = make_plan(RECIPE, file="tongues", setting="cut", model=model, data=data())
    stream = Streams(plan)(3)
    for task in stream.tasks:
        assert sum(len(parse_row(row)["text"].encode()) for row in task.train.inputs) == 120
        assert 1 <= len(task.test) <= 2
    assert stream.describe()["subsample"] == {"train": None, "test": 2}


def test_general_abilities_and_answers_are_measured_before_and_after(model, tmp_path, monkeypatch) -> None:
    rows = [{"instruction": "one", "output": "a", "label_set": ["a", "b"]}, {"instruction": "two", "output": "b"}]
    (tmp_path / "data" / "facts").mkdir(parents=True)
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "data" / "facts" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("EVERLORA_SHARED", str(tmp_path))
    text = RECIPE + "answers: true\ngeneral: [{name: facts, shared: facts}]\n"
    plan = make_plan(text, file="tongues", model=model, data=data(), options={"max_new_tokens": 4})
    record = execute(plan, "sequential", 3, streams=Streams(plan), out=tmp_path / "out", progress=lambda *_: None)
    known = record["language"]
    assert known["general_sets"] == ["facts"]
    assert [cell["answers"] for cell in known["base"]["general"]] == [2]
    assert "general" in known["stages"][-1]["measured"][0] and "general" not in known["stages"][0]["measured"][0]
    learner = Learner.open(tmp_path / "out" / "sequential-3" / "learner")
    evaluator = LanguageEvaluator(learner._trainer(), max_new_tokens=4)
    score = evaluator.score(load_dialogues(rows), answers=True)
    (cell,) = known["stages"][-1]["measured"][0]["general"]
    assert (cell["correct"], cell["rouge_l"]) == (score.correct, score.rouge_l)
    assert cell["nll"] == pytest.approx(score.nll)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("table: language\n", "", "needs table: language for stream.scenario: language"),
        ("scenario: language", "scenario: domain_incremental", "needs table: language for stream.scenario: language"),
        ("samples: 4", "samples: 0", "retention.samples"),
        ('prompts: ["ae", ', 'promts: ["ae", ', "did you mean 'prompts'"),
        ("test_bytes: 40", "test_byte: 40", "did you mean 'test_bytes'"),
    ],
)
def test_wrong_recipes_are_refused_with_a_sentence(old, new, words) -> None:
    with pytest.raises(OptionError, match=words):
        parse_recipe(RECIPE.replace(old, new), file="tongues.yaml")


def test_claims_may_name_weights_but_only_of_rows_that_exist() -> None:
    claim = "claims: {H: {claim: c, test: less, row: double/stable, against: [replay, %s], figures: [ce]}}\n"
    assert parse_recipe(RECIPE + claim % "double/plastic", file="t").claims["H"].rows == ("double", "replay", "double")
    with pytest.raises(OptionError, match=r"claims\.H names 'doble'"):
        parse_recipe(RECIPE + claim % "doble/plastic", file="t")
    with pytest.raises(OptionError, match="but not how near"):
        parse_recipe(RECIPE + claim.replace("less", "near") % "joint", file="t")


def test_the_first_bytes_end_within_a_character_or_a_row() -> None:
    rows = load_dialogues(["abcde", "fähig", "last"])
    assert [parse_row(row)["text"] for row in first_bytes(rows, 7).inputs] == [
        "abcde",
        "f",
    ]  # half an umlaut is left out
    assert [parse_row(row)["text"] for row in first_bytes(rows, 11).inputs] == ["abcde", "fähig"]
    assert len(first_bytes(rows, 1000)) == 3
    pairs = load_dialogues([{"instruction": "12345", "output": "67890"}, {"instruction": "1", "output": "2"}])
    assert len(first_bytes(pairs, 11)) == 1
    with pytest.raises(DataError, match="at most 5 bytes"):
        first_bytes(pairs, 5)


def test_rows_are_held_out_at_random_and_long_texts_at_their_end() -> None:
    train, held = hold_out_texts(load_dialogues([str(number) for number in range(40)]), fraction=0.1, seed=1)
    assert (len(train), len(held)) == (36, 4) and not set(train.inputs) & set(held.inputs)
    play = "\n".join(f"line {number}" for number in range(100))
    train, held = hold_out_texts(load_dialogues([play]), fraction=0.2, seed=1)
    first, second = (parse_row(part.inputs[0])["text"] for part in (train, held))
    assert first + second == play and second.startswith("line 8") and first.endswith("\n")
    with pytest.raises(DataError, match="20 rows or more"):
        hold_out_texts(load_dialogues([{"instruction": "1", "output": "2"}]), fraction=0.2, seed=1)


def test_several_data_sets_can_be_given_as_one_folder(tmp_path) -> None:
    (tmp_path / "vowels").mkdir()
    (tmp_path / "digits.txt").write_text("1 2 3", encoding="utf-8")
    assert given_part(tmp_path, "vowels", "r") == tmp_path / "vowels"
    assert given_part(tmp_path, "digits", "r") == tmp_path / "digits.txt"
    assert given_part(None, "digits", "r") is None
    with pytest.raises(DataError, match="no folder or file 'marks'"):
        given_part(tmp_path, "marks", "r")
    with pytest.raises(DataError, match="lacks 'marks'"):
        given_part({"vowels": 1}, "marks", "r")
    with pytest.raises(OptionError, match="folder that holds a folder or file for each"):
        given_part(tmp_path / "digits.txt", "marks", "r")


def test_rows_without_labels_make_a_stream_of_language_only() -> None:
    parts: dict[str, Examples] = {name: load_dialogues([f"{name} {n}" for n in range(9)]) for name in ("train", "test")}
    stream = by_datasets([("a", parts), ("b", parts)], name="s", scenario="language", subsample={"train": 4})
    assert [(len(task.train), task.labels) for task in stream.tasks] == [(4, ()), (4, ())]
    assert not set(stream.tasks[0].train.ids) & set(stream.tasks[1].train.ids)
    with pytest.raises(DataError, match="carry no labels"):
        by_datasets([("a", parts)], name="s", scenario="domain_incremental")


def test_every_row_of_the_packaged_recipes_trains_alike() -> None:
    """Only what makes a method itself may differ between rows."""
    recipe = load_recipe("stories-domains")
    for name, row in recipe.methods.items():
        assert (row.set["rank"], row.set["alpha"]) == (8, 16), name
        assert row.set["targets"] in (["all-linear"], recipe.methods["replay"].set["targets"]), name
        assert not {"lr", "batch_size", "max_steps", "optimizer"} & set(row.set), name
    assert {claim.row.partition("/")[0] for claim in recipe.claims.values()} <= set(recipe.methods)


def test_a_settings_backbone_options_win_over_the_recipes() -> None:
    text = RECIPE.replace("  cut: {", "  cut: {backbone: {block_size: 8}, ")
    plan = make_plan(text, file="t", setting="cut", methods=["replay"], model="m")
    assert row_options(plan, "replay", 1, 3)["block_size"] == 8
    assert row_options(plan, "replay", 1, 3)["max_length"] == 32
