from __future__ import annotations

import csv
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlora.cli import learning, runs
from everlora.methods import list_methods
from everlora.methods.catalogue import RECOMMENDED
from tests.cli.fakes import FakeLearner
from tests.tiny_models import save_tiny


def test_init_hands_every_switch_on(
    call_json: Any, learner: type[FakeLearner], intents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--model m --method probe --scenario task_incremental --text-column t --label-column l --task-column k"
    more = "--pooling mean --dtype bfloat16 --keep-validation 5 --keep-states all --seed 7"
    settings = "--set rank=4 --set lr=0.01"
    report = call_json("init", intents, *words.split(), *more.split(), *settings.split())
    [(verb, (folder, options))] = learner.calls
    assert (verb, folder) == ("create", intents)
    assert options == {
        "model": "m",
        "method": "probe",
        "scenario": "task_incremental",
        "columns": {"text": "t", "label": "l", "task": "k"},
        "pooling": "mean",
        "dtype": "bfloat16",
        "keep_validation": 5,
        "keep_states": "all",
        "seed": 7,
        "rank": 4,
        "lr": 0.01,
    }
    assert report["method"] == "inflora"  # what the directory says, not what was typed


def test_init_takes_what_is_recommended_unless_told(call: Any, learner: type[FakeLearner], intents: Path) -> None:
    code, out, err = call("init", intents)
    assert (code, err) == (0, "") and "model /models/[base]" in out and "No --method was given: probe with head=" in out
    assert "No --method" not in call("init", intents, "--method", "ncm")[1]
    call("init", intents, "--set", "head=ncm")
    call("init", intents, "--scenario", "language")
    made = [options for _, (_, options) in learner.calls]
    usual = {"scenario": "class_incremental", "columns": None}
    assert made[0] == usual | RECOMMENDED
    assert made[1] == usual | {"method": "ncm"}
    assert made[2] == usual | RECOMMENDED | {"head": "ncm"}
    assert made[3] == {"scenario": "language", "columns": None}
    for words in (("--keep-validation", "2"), ("--set", "keep_validation=2")):
        assert "only on rows kept back" not in call("init", intents, *words)[1]
    out = call("init", intents, "--set", "rank=2")[1]
    assert "only on rows kept back" in out
    assert "inflora, which has the options given" in out
    assert learner.calls[-1][1][1] == usual | {"method": "inflora", "rank": 2}


def test_init_takes_no_more_layers_than_the_model_has(
    call: Any, learner: type[FakeLearner], intents: Path, tmp_path: Path
) -> None:
    model = save_tiny("bert", tmp_path / "bert")
    call("init", intents, "--model", str(model))
    call("init", intents, "--model", str(model), "--set", "feature_layers=1")
    call("init", intents, "--model", str(model), "--pooling", "pooler")
    assert [options["feature_layers"] for _, (_, options) in learner.calls] == [2, 1, 1]
    code, _, err = call("init", intents, "--model", str(tmp_path / "absent"))
    assert code != 0 and "absent" in err and "Traceback" not in err


def test_learn(call: Any, call_json: Any, learner: type[FakeLearner]) -> None:
    code, out, err = call("learn", "f", "february.csv", "--model", "m", "--validation", "v.csv", "--set", "epochs=2")
    assert (code, err) == (0, "")
    learned = ("learn", ("february.csv", None, "v.csv", None, {"epochs": 2}))
    assert learner.calls == [("open", (Path("f"), "m")), learned]
    for said in (
        "Task 2 'february'",
        "30 rows of 2 labels",
        "1 min 05 s",
        "New labels (1): parcel",
        "Known labels (1): refund",
        "january",
        "50.00",
        "100.00",
    ):
        assert said in out
    result = call_json("learn", "f", "february.csv", "--name", "second")
    assert (result["name"], result["known_labels"], result["metrics"]["january"]) == ("second", ["refund"], 0.5)


def test_rows_that_were_learned_already_are_told_of(
    call: Any, learner: type[FakeLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "data_sha256", ("1" * 64, "1" * 64))
    for more in ((), ("--json",)):
        code, out, err = call("learn", "my f", "january.csv", *more)
        assert code == 0 and "february" in out
        assert err == (
            "warning: the rows of task 'february' are those of task 'january', which was learned already; if that was "
            "a mistake, take it back with: everlora rollback 'my f' --to-task 1\n"
        )


def test_columns_named_for_one_file(call: Any, learner: type[FakeLearner]) -> None:
    words = ("--text-column", "body", "--column", "label=tag")
    code, _, err = call("learn", "f", "march.csv", *words)
    assert (code, err) == (0, "")
    _, (data, name, validation, columns, _) = learner.calls[-1]
    assert (data, name, validation, columns) == ("march.csv", None, None, {"text": "body", "label": "tag"})
    call("eval", "f", "march.csv", *words)
    assert learner.calls[-1] == ("evaluate", ("march.csv", {"text": "body", "label": "tag"}))
    for wrong in ("tag", "label=", "text=other"):
        code, _, err = call("learn", "f", "march.csv", *words, "--column", wrong)
        assert code == 2 and "--column" in err


def test_predict_words(call: Any, call_json: Any, learner: type[FakeLearner]) -> None:
    _, out, _ = call("predict", "f", "where is it", "refund me", "--task", "january", "--top", "2")
    assert learner.calls[-1] == ("predict", (["where is it", "refund me"], "january"))
    assert out.count("where is it") == 1 and out.count("parcel") == 2 and "0.7500" in out
    [answer] = call_json("predict", "f", "where is it")
    assert answer == {
        "input": "where is it",
        "label": "refund",
        "score": 0.75,
        "top": [{"label": "refund", "score": 0.75}],
    }


def test_predict_a_file(call: Any, call_json: Any, learner: type[FakeLearner], intents: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    # `utterance` is the column the learner was told of; a label column that is empty must not matter.
    source.write_text("id,utterance,intent,note\n01,where is it,,a\n02,refund me,,b\n")
    code, out, err = call("predict", intents, "--input", source, "--output", target)
    assert (code, err) == (0, "") and "Wrote 2 rows" in out
    assert learner.calls[-1] == ("predict", (["where is it", "refund me"], None))
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert rows[0] == {
        "id": "01",
        "utterance": "where is it",
        "intent": "",
        "note": "a",
        "label": "refund",
        "score": "0.75",
    }
    call("predict", intents, "--input", source, "--text-column", "note")
    assert learner.calls[-1] == ("predict", (["a", "b"], None))
    assert call_json("predict", intents, "--input", source, "--output", target) == {
        "output": str(target),
        "num_rows": 2,
        "columns": ["label", "score"],
    }
    assert [row["input"] for row in call_json("predict", intents, "--input", source)] == ["where is it", "refund me"]


def test_predict_none_of_these(
    call: Any, call_json: Any, learner: type[FakeLearner], intents: Path, tmp_path: Path
) -> None:
    share = ("--none-of-these", "0.05")
    _, out, _ = call("predict", "f", "refund me", "will it rain", *share)
    lines = [line.split() for line in out.splitlines() if "me" in line or "rain" in line]
    assert lines == [["refund", "me", "refund", "0.7500"], ["will", "it", "rain", "none", "of", "these", "-"]]
    _, out, _ = call("predict", "f", "will it rain", *share, "--top", "2")
    assert [line.split()[-2:] for line in out.splitlines() if line.strip()][-3:] == [
        ["these", "-"],
        ["refund", "0.7500"],
        ["parcel", "0.2500"],
    ]
    known, unknown = call_json("predict", "f", "refund me", "will it rain", *share)
    assert known["label"] == "refund"
    assert unknown == {
        "input": "will it rain",
        "label": None,
        "score": 0.75,
        "top": [{"label": "refund", "score": 0.75}],
    }
    source = tmp_path / "in.csv"
    source.write_text("utterance\nrefund me\nwill it rain\n")
    written = call_json("predict", intents, "--input", source, "--output", tmp_path / "out.csv", *share)
    assert written["columns"] == ["label", "score", "best_label"]
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["label"], row["best_label"]) for row in rows] == [("refund", "refund"), ("", "refund")]


def test_predict_names_a_missing_column(call: Any, learner: type[FakeLearner], intents: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,utterances\n01,where\n")
    code, _, err = call("predict", intents, "--input", tmp_path / "in.csv")
    assert code == 2 and "has no column 'utterance'; did you mean 'utterances'?" in err


def test_predict_checks_the_output_before_the_model_is_loaded(
    call: Any, learner: type[FakeLearner], tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("text\na\n")
    code, _, err = call("predict", "f", "--input", tmp_path / "in.csv", "--output", tmp_path / "out.xls")
    assert code == 2 and ".xls" in err and learner.calls == []


def test_eval(call: Any, call_json: Any, learner: type[FakeLearner]) -> None:
    _, out, _ = call("eval", "f")
    assert (
        learner.calls[-1] == ("evaluate", (None, None)) and "Accuracy 80.00 % on 10 rows." in out and "january" in out
    )
    assert call_json("eval", "f", "test.csv")["counts"]["january"]["correct"] == 8
    assert learner.calls[-1] == ("evaluate", ("test.csv", None))


def test_status_shows_what_became_of_each_task(
    call: Any, call_json: Any, intents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = call("status", intents)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    january = next(line for line in lines if "january" in line).split()
    assert january == ["1", "january", "40", "3.5", "s", "2", "-", "90.00", "70.00", "-20.00"]
    february = next(line for line in lines if "february" in line).split()
    assert february == ["2", "february", "30", "4.0", "s", "1", "parcel", "75.00", "75.00", "+0.00"]
    assert "2 tasks, 3 labels: refund, parcel, invoice" in out and "Mean accuracy now: 72.50 %" in out
    assert call_json("status", intents)["num_tasks"] == 2


def test_status_of_a_folder_that_is_no_learner(call: Any, tmp_path: Path) -> None:
    code, out, err = call("status", tmp_path / "typo")
    assert (code, out) == (2, "") and "typo" in err and err.count("\n") == 1


def test_export(call: Any, call_json: Any, learner: type[FakeLearner]) -> None:
    code, out, _ = call("export", "f", "served")
    assert code == 0 and "Wrote the merged model to served" in out and "2.0e-07" in out
    assert learner.calls[-1] == ("export", (Path("served"), "merged"))
    assert call_json("export", "f", "served", "--format", "peft") == {
        "format": "peft",
        "folder": "served",
        "max_difference": 2e-7,
        "truncation": {},
    }
    assert learner.calls[-1] == ("export", (Path("served"), "peft"))
    code, out, _ = call("export", "f", "served", "--format", "peft", "--max-rank", "4")
    assert code == 0 and "Largest relative error of the 1 layers cut to rank 4: 1.2e-01" in out
    assert learner.calls[-1] == ("export", (Path("served"), "peft", ("max_rank", 4)))
    call("export", "f", "served", "--task", "february")
    assert learner.calls[-1] == ("export", (Path("served"), "merged", ("task", "february")))


def test_rollback(call: Any, call_json: Any, learner: type[FakeLearner], intents: Path) -> None:
    _, out, _ = call("rollback", intents, "--to-task", "2")
    assert learner.calls[-1] == ("rollback", 2) and "as it was after 2 tasks" in out and "february" in out
    assert call_json("rollback", intents, "--to-task", "2")["num_tasks"] == 2


def test_methods(call: Any, call_json: Any) -> None:
    _, out, _ = call("methods")
    assert all(entry.name in out for entry in list_methods()) and f"{RECOMMENDED['method']} (default, with head=" in out
    assert {entry["name"] for entry in call_json("methods")} >= {"inflora", "sequential", "joint", "probe", "ncm"}
    _, out, _ = call("methods", "InfLoRA-opt")
    assert "forward_mode" in out and "epochs" in out and "keep_validation" in out
    report = call_json("methods", "inflora")
    assert set(report["options"]) == {"method", "training", "model", "learner", "head"}
    code, _, err = call("methods", "infora")
    assert code == 2 and "did you mean 'inflora'" in err


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`run` replaced by one that remembers its arguments and answers with a tiny result."""
    asked: list[dict[str, Any]] = []

    def run(recipe: str, *, progress: Callable[[str, int, int], None], **options: Any) -> dict[str, Any]:
        progress("train", 1, 1)
        asked.append({"recipe": recipe, **options})
        return {
            "format": 1,
            "stream": {"num_tasks": 2, "sizes": [10, 10]},
            "runs": [
                {"method": "probe", "label": "Frozen probe", "seed": seed, "correct": [[9, None], [8, 7]]}
                for seed in (1, 2)
            ],
            "folder": "runs/x",
        }

    import everlora.experiments

    monkeypatch.setattr(everlora.experiments, "run", run, raising=False)
    return asked


def test_run(call: Any, call_json: Any, experiments: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a narrower table breaks names over lines
    words = "--methods probe,ncm --seeds 1,2 --data d --model m --setting full --set epochs=1 --out o --workers 2"
    code, out, err = call("run", "digits", *words.split(), "--path-points", "9")
    assert (code, err) == (0, "")
    assert experiments == [
        {
            "recipe": "digits",
            "methods": ["probe", "ncm"],
            "seeds": [1, 2],
            "data": "d",
            "model": "m",
            "setting": "full",
            "out": Path("o"),
            "options": {"epochs": 1},
            "workers": 2,
            "path_points": 9,
        }
    ]
    assert "Frozen probe" in out and "75.00" in out
    assert str(Path("runs/x/results.json")) in out and str(Path("runs/x/report.html")) in out
    assert call_json("run", "digits")["folder"] == "runs/x"


def test_recipes(call: Any, call_json: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    info = types.SimpleNamespace(
        name="digits", title="Digits", status="runs-here", settings={"standard": 2.5, "full": None}
    )
    import everlora.experiments

    monkeypatch.setattr(everlora.experiments, "list_recipes", lambda: [info])
    monkeypatch.setattr(everlora.experiments, "recipe_text", lambda name: f"name: {name}\n")
    _, out, _ = call("recipes")
    assert "digits" in out and "runs-here" in out and "standard 2 min 30 s" in out and "full" not in out
    assert call("recipes", "digits")[1] == "name: digits\n"
    assert call_json("recipes", "digits") == {"name": "digits", "text": "name: digits\n"}


def test_the_recipes_that_come_with_the_package(call: Any, call_json: Any) -> None:
    code, _, err = call("recipes", "nothing-like-it")
    assert code == 2 and err.startswith("error: ") and "nothing-like-it" in err
    assert isinstance(call_json("recipes"), list)


def test_verbs_document_themselves() -> None:
    for function in (learning.init, learning.learn, runs.run, runs.recipes):
        assert function.__doc__ and "Args:" not in function.__doc__


def test_json_output_is_ascii_safe_for_pipes(call: Any, learner: type[FakeLearner]) -> None:
    _, out, _ = call("predict", "f", "où est-il", "--json")
    assert json.loads(out)[0]["input"] == "où est-il"
