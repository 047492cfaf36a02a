from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from everlora.cli import output


@dataclass(frozen=True)
class Point:
    name: str
    value: float


def test_plain_turns_results_into_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "point": Point("a", float("nan")),
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "array": np.array([1, 2]),
        "path": Path("x"),
        "pair": (1, None, True),
        3: {"b"},
    }
    output.emit_json(value)
    assert json.loads(capsys.readouterr().out) == {
        "point": {"name": "a", "value": None},
        "scalar": 0.5,
        "count": 3,
        "array": [1, 2],
        "path": "x",
        "pair": [1, None, True],
        "3": ["b"],
    }


def test_labels_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("label", "score"), [("[red]:smile:[/red]", "0.5")])
    output.line("[bold]x[/bold]")
    out = capsys.readouterr().out
    assert "[red]:smile:[/red]" in out and "[bold]x[/bold]" in out


def test_long_cells_are_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("text",), [("word " * 100,)])
    assert capsys.readouterr().out.count("word") == 100


@pytest.mark.parametrize(
    ("fraction", "text", "signed"),
    [
        (0.86614, "86.61", "+86.61"),
        (-0.2, "-20.00", "-20.00"),
        (None, "-", "-"),
        (float("nan"), "-", "-"),
        (0.0, "0.00", "+0.00"),
    ],
)
def test_percent(fraction: float | None, text: str, signed: str) -> None:
    assert output.percent(fraction) == text
    assert output.signed_percent(fraction) == signed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (None, "-"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


def test_listing_and_count() -> None:
    assert output.listing(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert output.listing(["a", "b"], most=2) == "a, b"
    assert output.listing(["a", "lost, found"]) == "a, 'lost, found'"
    assert (output.count(1, "task"), output.count(0, "task")) == ("1 task", "0 tasks")
