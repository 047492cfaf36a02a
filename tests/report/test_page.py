"""The HTML page: its numbers, that it loads nothing, and that unusual runs do not break it."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from everlora.errors import DataError
from everlora.metrics import AccuracyMatrix
from everlora.report import format_table, render_report, summarise, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page: tables by caption, tags with their attributes, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data


def headline(page: Page) -> list[list[str]]:
    return page.tables["Mean ± sample deviation over runs; every task weighs the same"]


def test_numbers_are_those_of_the_table(results: dict[str, Any]) -> None:
    page, rows = Page(render_report(results)), summarise(results)
    table, samples = format_table(rows), format_table(rows, mean="samples")
    assert headline(page) == [table.columns, *table.rows]
    caption = "Mean ± sample deviation over runs; every test sample weighs the same"
    assert page.tables[caption] == [samples.columns, *samples.rows]


def test_heat_map_holds_the_mean_of_the_cells(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    runs = [run for run in results["runs"] if run["method"] == "falling"]
    cells = [AccuracyMatrix.from_counts(run["correct"], run["sizes"]).values[2, 1] for run in runs]
    heat = page.tables["Falling"]
    assert heat[0] == ["task", "1", "2", "3"]
    assert heat[3][0] == "after 3"
    assert heat[3][2] == f"{100 * sum(cells) / 3:.1f}"
    assert heat[1][2:] == ["", ""]


def test_a_heat_map_of_many_tasks_has_small_cells_that_keep_their_numbers(make_results: Any) -> None:
    page = Page(render_report(make_results(num_tasks=31, seeds=(1,))))
    heat = page.tables["Falling"]
    assert [len(row) for row in heat] == [32] * 32 and heat[31][1]
    titles = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert f"after 31, 1: {heat[31][1]}" in titles
    kinds = [attributes.get("class") or "" for tag, attributes in page.tags if tag == "table"]
    assert kinds.count("heat tiny many") == 2 and "heat tiny" in kinds  # matrices, and a panel of few layers


def test_a_run_that_fills_only_the_last_row_shows_only_that_row(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    assert [row[0] for row in page.tables["Together"]] == ["task", "after 3"]


def test_curves_end_at_the_headline_numbers(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    curves = page.tables["Accuracy % after each task (task mean)"]
    assert [row[-1] for row in curves[1:]] == [row[1] for row in headline(page)[1:]]
    forgetting = page.tables["Forgetting in points after each task"]
    assert [row[-1] for row in forgetting[1:]] == [row[3] for row in headline(page)[1:]]


def test_panels_published_figures_and_recipe_are_shown(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    assert page.tables["Occupied dimensions per layer: Falling"][1] == ["layer.0", "4", "8", "12"]
    published = next(rows for caption, rows in page.tables.items() if caption.startswith("Percent as printed"))
    assert published[1] == ["A paper", "other data", "86.51", "–", "one order"]  # noqa: RUF001
    assert "Published figures, not run here" in page.text
    assert results["recipe"]["text"] in page.text
    assert page.tables["Versions"][1] == ["numpy", "2.0"]
    assert ["targets", '["key", "value"]'] in page.tables["Settings"]


def test_nothing_is_loaded_and_nothing_runs(results: dict[str, Any]) -> None:
    text = render_report(results)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "use"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#"), "links stay on the page"
        assert not any(name.startswith("on") for name in attributes)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "prefers-color-scheme:dark" in style[0]
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "Content-Security-Policy" in a.values()]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_text_of_the_results_cannot_become_markup(results: dict[str, Any]) -> None:
    attack = "<script>alert(1)</script>\"'><b>"
    results["recipe"] |= {"title": attack, "text": attack}
    results |= {"notes": attack, "settings": {attack: attack}}
    for run in results["runs"]:
        run["label"] = attack + run["method"]
    results["runs"][0]["panels"] = {attack: {attack: [1, None, 3]}}
    page = Page(render_report(results))
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert attack in page.text


def test_charts_have_words_for_those_who_do_not_see_them(results: dict[str, Any]) -> None:
    page = Page(render_report(results))
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 6
    for attributes in figures:
        assert all(name in page.ids for name in (attributes["aria-labelledby"] or "").split())
    assert len(page.ids) == len(set(page.ids))
    last = summarise(results)[0]["metrics"]["last"]["mean"]
    assert f"Falling {100 * last:.2f} after task 3" in page.text
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


@pytest.mark.parametrize(("num_tasks", "seeds"), [(1, (1,)), (1, (1, 2)), (2, (1,)), (14, (1, 2)), (30, (5,))])
def test_other_shapes_of_run(
    make_results: Callable[..., dict[str, Any]], num_tasks: int, seeds: tuple[int, ...]
) -> None:
    results = make_results(num_tasks=num_tasks, seeds=seeds)
    page = Page(render_report(results))
    assert headline(page)[1:] == format_table(summarise(results)).rows
    coordinates = [attributes.get("d") or "" for tag, attributes in page.tags if tag == "path"]
    assert not any("nan" in path or "inf" in path for path in coordinates)
    drawn = sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in page.tags)
    # One task cannot be forgotten, and makes no curve of a panel; three are of costs.
    assert drawn == (4 if num_tasks == 1 else 6)
    assert ("tendency" in page.text) == (len(seeds) < 3)


def test_points_stay_inside_the_drawing(make_results: Callable[..., dict[str, Any]]) -> None:
    results = make_results(num_tasks=6)
    for run in results["runs"]:
        run["correct"][5][:5] = [0] * 5  # a collapse to zero, far below the other points
    for tag, attributes in Page(render_report(results)).tags:
        if tag == "circle":
            assert 0 <= float(attributes["cx"] or "nan") <= 460
            assert 0 <= float(attributes["cy"] or "nan") <= 300


def test_only_what_is_there_is_shown(results: dict[str, Any]) -> None:
    minimal = {key: results[key] for key in ("format", "stream", "runs")}
    minimal["stream"] = {"name": "s", "num_tasks": 3, "sizes": [40, 50, 60]}
    page = Page(render_report(minimal))
    assert "Published" not in page.text
    assert "Recipe" not in page.text
    assert "No run has been recorded" in Page(render_report(results | {"runs": []})).text


def test_two_methods_with_one_label_are_told_apart(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        run["label"] = "Same"
    page = Page(render_report(results))
    assert {"Same (falling)", "Same (steady)", "Same (together)"} <= page.tables.keys()


def test_unmeasured_runs_make_a_page_without_charts(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        run |= {"correct": [[None] * 3] * 3, "task_aware": None, "task_correct": None, "panels": {}, "cost": []}
    page = Page(render_report(results))
    assert not [tag for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]


def test_writing_makes_folders_and_replaces(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(results, path)
    first = path.read_text(encoding="utf-8")
    write_report(json.loads(json.dumps(results)), path)
    assert path.read_text(encoding="utf-8") == first == render_report(results)


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("everlora.store.files.os.fsync", full)
        with pytest.raises(DataError, match=r"report\.html cannot be written: No space left on device; give"):
            write_report(results, path)
    assert path.read_text(encoding="utf-8") == "old"
    with pytest.raises(DataError, match=r"page\.html cannot be written: .*; give write permission there"):
        write_report(results, path / "page.html")
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        write_report(results, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_device_or_pipe_is_written_to_and_not_replaced(results: dict[str, Any], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_report(results, pipe)
    assert pipe.is_fifo()
    reader.join(timeout=30)
    assert read == [render_report(results).encode("utf-8")]


def test_results_of_another_format_are_refused(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format"):
        write_report(results | {"format": 9}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_curves_that_stay_at_one_hundred_percent_are_drawn(make_results: Callable[..., dict[str, Any]]) -> None:
    results = make_results(seeds=(1,))
    for run in results["runs"]:
        for row in run["correct"]:
            for task, cell in enumerate(row):
                row[task] = None if cell is None else run["sizes"][task]
        run["task_aware"] = run["task_correct"] = run["correct"]
    assert "100" in render_report(results)


def test_notes_are_broken_by_the_page_and_keep_their_lists(results: dict[str, Any]) -> None:
    results["notes"] = "One sentence\ngoes on.\n\nNext:\n- first\n- second\n  indented\n"
    assert "One sentence goes on.\n\nNext:\n- first\n- second\n  indented" in Page(render_report(results)).text


def test_what_was_not_measured_has_no_empty_matrix(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        if run["method"] == "steady":
            run |= {"correct": [[None] * 3] * 3, "task_aware": None, "task_correct": None}
    tables = Page(render_report(results)).tables
    assert "Steady" not in tables and "Falling" in tables
