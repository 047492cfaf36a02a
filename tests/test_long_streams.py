"""The benchmark of long streams, by its own functions on a few small tasks; and its page is what the file says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy import FAST, tiny_model, toy_images

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import long_streams
from long_stream_data import LongStream
from long_stream_page import PAGE, page
from long_stream_rows import Row

TASKS = (["a"], ["b", "c"], ["a", "d"], ["b", "c"])
ROWS = (
    Row("ncm", "ncm", {"head": "linear"}),
    Row("sequential", "sequential", {"rank": 2}),
    Row("sequential head=linear", "sequential", {"rank": 2, "head": "linear"}),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder; the benchmark learns a toy stream, in this process."""
    model, seen, tests = tiny_model("vit", tmp_path / "model"), set[str](), []
    for index, names in enumerate(TASKS):
        new = [name for name in names if name not in seen]
        seen |= set(new)
        tests.append(toy_images(new, 2, seed=100 + index) if new else None)
    tasks = [toy_images(names, 2 + index, seed=index) for index, names in enumerate(TASKS)]
    options = {**FAST, "epochs": 1, "head": "ridge"}

    def toy(number: int) -> LongStream:
        stream = LongStream("toy", "Toys", "Small ones.", "class_incremental", str(model), tasks, tests, options)
        return stream.first(number)

    def directly(function: Any, *arguments: Any) -> dict[str, Any]:
        try:
            return function(*arguments)
        except long_streams.EverloraError as error:
            return {"refused": str(error)}

    monkeypatch.setattr(long_streams, "STREAMS", {"toy": toy})
    monkeypatch.setattr(long_streams, "rows_of", lambda name: ROWS)
    monkeypatch.setattr("long_stream_page.rows_of", lambda name: (*ROWS, Row("probe", "probe")))
    monkeypatch.setattr(long_streams, "in_a_fork", directly)
    return tmp_path


@pytest.mark.slow
def test_rows_are_measured_once_and_told_on_a_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = place / "results.json"
    long_streams.run(["toy"], ["ncm"], 4, file, place=place)
    results = long_streams.run(["toy"], [], 4, file, place=place)
    assert results == long_streams.load(file)
    ncm, sequential, linear = results["rows"]
    assert [row["row"] for row in results["rows"]] == [row.label for row in ROWS]
    for row in (ncm, sequential):
        assert row["num_tasks"] == 4 and list(row["figures"]) == ["1", "2", "3", "4"] and row["figures"]["1"] == 1
        assert all(len(row[key]) == 3 and min(row[key]) > 0 for key in ("busy", "wall", "disk_bytes", "state_bytes"))
        assert row["open_seconds"] > 0 and row["status_lines_80"] == row["status_all_lines"] >= 4
    assert ncm["last"] == 1, "means of mean colours, on a frozen encoder"
    assert "head=ridge" in linear["refused"] and "one class" in linear["refused"] and "num_tasks" not in linear
    text = page(results)
    assert "| `ncm` | " in text and "- `sequential head=linear` refused: task 'task-001' has one class" in text
    assert "Not measured yet: `probe`." in text and "100.0" in text
    monkeypatch.setattr(long_streams, "measure", None)
    long_streams.run(["toy"], [], 4, file, place=place)
    with pytest.raises(SystemExit, match="--tasks 4"):
        long_streams.run(["toy"], [], 3, file, place=place)


def test_windows_are_medians_of_ten() -> None:
    assert long_streams.windows([99.0, *([1.0] * 10), *([2.0] * 79), *([3.0] * 10)]) == [1.0, 2.0, 3.0]
    assert long_streams.windows([5.0]) == [5.0, 5.0, 5.0]


def test_the_page_is_what_the_file_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(long_streams.load(long_streams.RESULTS))
