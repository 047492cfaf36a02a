from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everlora.report import render_report
from tests.report.conftest import sample_results


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(sample_results()), encoding="utf-8")
    return folder


def test_the_page_is_made_again_from_the_results(call: Any, finished: Path) -> None:
    assert call("report", finished) == (0, f"Wrote {finished / 'report.html'}\n", "")
    assert (finished / "report.html").read_text(encoding="utf-8") == render_report(sample_results())


def test_the_page_goes_where_it_is_wanted(call_json: Any, finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    said = call_json("report", finished, "--out", page)
    assert said == {"report": str(page), "kind": "run", "bytes": page.stat().st_size}
    assert not (finished / "report.html").exists()


def test_a_learner_has_a_page_outside_its_folder(
    call_json: Any, intents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(intents.rglob("*"))
    said = call_json("report", intents)
    assert said["kind"] == "learner" and said["report"] == "intents-report.html"
    assert "january" in (tmp_path / "intents-report.html").read_text(encoding="utf-8")
    assert sorted(intents.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "holds neither results.json nor a learner"),
        (lambda folder: (folder / "plan.json").write_text("{}"), "holds a run that is not finished"),
        (lambda folder: (folder / "results.json").write_text('{"format": 9, "stream": {}}'), "must have format 1"),
        (lambda folder: (folder / "results.json").write_text("{"), "results.json"),
    ],
)
def test_what_is_no_result_is_one_sentence(call: Any, tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path)
    code, out, err = call("report", tmp_path)
    assert code in (1, 2) and out == ""
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_report_needs_no_torch(finished: Path) -> None:
    code = "import sys; from everlora.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", finished], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
