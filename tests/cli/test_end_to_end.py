"""The practitioner's commands on a small random model: no number here means anything, every file does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_models import save_tiny

JANUARY = [("where is my parcel", "parcel"), ("my parcel is lost", "parcel"), ("red card", "card"), ("card", "card")]
FEBRUARY = [("my card is lost", "card"), ("card is red", "card"), ("blue green blue", "colour"), ("green", "colour")]


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    return {
        "january": _write(tmp_path / "january.csv", JANUARY * 3),
        "february": _write(tmp_path / "february.csv", FEBRUARY * 3),
    }


def test_a_text_learner_from_init_to_rollback(
    call: Any, call_json: Callable[..., Any], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths, as people type them
    save_tiny("bert", tmp_path / "base")
    options = ("--method", "inflora", "--keep-validation", 1, "--set", "rank=2")
    code, out, err = call("init", "intents", "--model", "base", *options)
    assert (code, err) == (0, "") and "Made a learner in intents" in out
    assert call("init", "intents", "--model", "base")[0] == 2

    first = call_json("learn", "intents", "january.csv", "--set", "epochs=1")
    assert (first["name"], first["new_labels"]) == ("january", ["card", "parcel"])
    code, out, err = call("learn", "intents", "february.csv", "--set", "epochs=1")
    assert (code, err) == (0, "")
    assert "Task 2 'february'" in out and "New labels (1): colour" in out and "Known labels (1): card" in out

    report = call_json("status", "intents")
    assert report["labels"] == ["card", "parcel", "colour"]
    assert [task["known_labels"] for task in report["tasks"]] == [[], ["card"]]
    assert all(task["accuracy_now"] is not None for task in report["tasks"])
    assert set(call_json("eval", "intents")["per_task"]) == {"january", "february"}
    assert call_json("eval", "intents", "february.csv")["counts"].keys() == {"january", "february"}

    [answer] = call_json("predict", "intents", "my lost card", "--top", 3)
    assert {entry["label"] for entry in answer["top"]} == {"card", "parcel", "colour"}
    assert sum(entry["score"] for entry in answer["top"]) == pytest.approx(1, abs=1e-5)
    code, _, err = call("predict", "intents", "--input", "january.csv", "--output", "labelled.jsonl")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in Path("labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == JANUARY * 3
    assert {row["predicted_label"] for row in rows} <= {"card", "parcel", "colour"}

    for layout, file in (("merged", "model.safetensors"), ("peft", "adapter_model.safetensors")):
        written = call_json("export", "intents", f"served-{layout}", "--format", layout)
        assert written["max_difference"] < 1e-4 and (tmp_path / f"served-{layout}" / file).is_file()

    (tmp_path / "base").rename(tmp_path / "moved")
    code, _, err = call("predict", "intents", "my card")
    assert code == 2 and "--model" in err
    assert call("predict", "intents", "my card", "--model", "moved")[0] == 0
    code, out, err = call("rollback", "intents", "--to-task", 1, "--model", "moved")
    assert (code, err) == (0, "") and "after 1 task." in out and "february" in out
    assert call_json("status", "intents")["labels"] == ["card", "parcel"]


def test_an_image_learner_reads_files_and_folders(
    call: Any, call_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "blue"):
        Path("colours", colour).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (16, 16), colour).save(Path("colours", colour, f"{index}.png"))
    save_tiny("vit", tmp_path / "base")
    assert call("init", "usual", "--model", "base")[0] == 0
    assert "usual: probe with head=lda and feature_layers=2, class_incremental" in call("status", "usual")[1]
    assert call("init", "eyes", "--model", "base", "--method", "ncm")[0] == 0
    code, _, err = call("learn", "eyes", "colours")
    assert (code, err) == (0, "")
    answers = call_json("predict", "eyes", "colours/red/0.png", "colours/blue/1.png")
    assert [answer["label"] for answer in answers] == ["red", "blue"]
    assert call("predict", "eyes", "--input", "colours", "--output", "out.csv")[0] == 0
    with open("out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["blue"] * 3 + ["red"] * 3
    assert [row["predicted_label"] for row in rows] == ["blue"] * 3 + ["red"] * 3
    code, _, err = call("predict", "eyes", "colours/red/9.png")
    assert code == 2 and "colours/red/9.png does not exist" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "inflro"], "did you mean"),
        (["--set", "rnk=3"], "did you mean 'rank'"),
        (["--set", "rank=-1"], "rank"),
        (["--scenario", "klass"], "klass"),
        (["--model", "nowhere/at/all"], "nowhere"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_init_refuses_in_one_sentence_and_leaves_nothing(
    call: Any, tmp_path: Path, words: list[str], said: str
) -> None:
    save_tiny("bert", tmp_path / "base")
    code, out, err = call("init", tmp_path / "new", "--model", tmp_path / "base", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "new").exists()
