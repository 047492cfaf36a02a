from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everlora.comparison import compare
from tests.comparison.results import folder, results


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets")


def test_a_table_for_people(call: Any, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call("compare", pets)
    assert (code, err) == (0, "")
    assert out.startswith("pets, class-incremental, 2 tasks, 700 train and 150 test rows\n")
    assert "87.00 ± 2.00" in out and "85.33 ± 2.00" in out and "-9.67 (p<0.001)" in out
    code, out, _ = call("compare", pets, "--as", "mammoth", "--baseline", "naive")
    assert code == 0 and "[Class-IL]" in out and "Means over tasks; forgetting lets the last row compete" in out


def test_json_and_files(call: Any, call_json: Callable[..., Any], pets: Path, tmp_path: Path) -> None:
    found = call_json("compare", pets, "--metrics", "last,fwt", "--test", "wilcoxon")
    expected = compare(pets, metrics=["last", "fwt"], test="wilcoxon")
    assert found == json.loads(expected.render("json")) and found["test"] == "wilcoxon"
    assert found["tables"][0]["rows"][1]["against_baseline"]["last"]["p"] == 0.25
    out = tmp_path / "table.tex"
    assert call("compare", pets, "--out", out) == (0, f"Wrote {out}\n", "")
    assert out.read_text(encoding="utf-8") == compare(pets).render("latex")
    assert call("compare", pets, "--format", "csv")[1] == compare(pets).render("csv")
    assert call("compare", pets, "--format", "csv", "--out", out)[0] == 0
    assert out.read_text(encoding="utf-8") == compare(pets).render("csv")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "absent: there is no such folder"),
        (["pets", "cars"], "have nothing in common"),
        (["pets", "--baseline", "oures"], "did you mean 'ours'"),
        (["pets", "--metrics", "lst"], "did you mean 'last'"),
        (["pets", "--as", "mamoth"], "did you mean 'mammoth'"),
        (["pets", "--format", "word"], "there is no format 'word'"),
        (["pets", "--out", "table.doc"], "no format has the suffix '.doc'"),
        (["pets", "--test", "f"], "no paired test 'f'"),
        ([], "RUN..."),
    ],
)
def test_wrong_use_is_one_sentence(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = {"ours": {1: (90, 80, 45)}}
    folder(tmp_path / "pets", results(counts))
    cars = results(counts)
    cars["stream"]["name"] = "cars"
    folder(tmp_path / "cars", cars)
    code, out, err = call("compare", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
