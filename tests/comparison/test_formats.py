from __future__ import annotations

import copy
import csv
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlora.comparison import FORMATS, compare
from everlora.errors import DataError, OptionError
from everlora.report import format_table, summarise
from tests.comparison.results import folder, results
from tests.report.language_results import language_results

NASTY = "A_B & 50% {x}~^\\#$|<b>[y]"


def _nasty() -> dict[str, Any]:
    content = copy.deepcopy(results())
    for run in content["runs"]:
        run["label"] = NASTY + run["label"]
    content["published"] = [{"source": NASTY, "method": "ours", "last": 86.5, "note": NASTY}]
    return content


def _latex_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Width of each table and its lines of cells."""
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        yield len(columns), [line for line in body.splitlines() if line.endswith(r"\\")]


def test_latex_escapes_and_every_line_has_as_many_cells_as_the_table(tmp_path: Path) -> None:
    text = compare(folder(tmp_path / "a", _nasty())).render("latex")
    escaped = r"A\_B \& 50\% \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\#\$\textbar{}\textless{}b"
    assert escaped + r"\textgreater{}[y]OURS & 87.00 $\pm$ 2.00 & 85.33 $\pm$ 2.00" in text
    tables = list(_latex_rows(text))
    assert [len(lines) for _, lines in tables] == [
        3,
        2,
        2,
        2,
    ]  # headings with rows, differences, published figures, claims
    for width, lines in tables:
        assert all(len(re.findall(r"(?<!\\)&", line)) == width - 1 for line in lines)
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}") and text.count(r"\toprule") == 4 == text.count(r"\bottomrule")
    assert r"$-$9.67 (p\textless{}0.001)" in text
    assert not re.search(r"\\\\\s*\n\[", text), "a bracket after a line's end would be read as its option"


def test_markdown_keeps_cells_apart(tmp_path: Path) -> None:
    text = compare(folder(tmp_path / "a", _nasty())).render("markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows}
    assert widths == {7, 10, 5} and "&lt;b&gt;" in text and "<b>" not in text
    assert "| ---: | ---: | ---: | ---: | ---: | ---: |" in rows[1]


def test_csv_and_json_have_every_digit(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "a", _nasty()), printed_as="avalanche")
    lines = list(csv.DictReader(io.StringIO(found.render("csv"))))
    measured = {(line["row"], line["number"]): line for line in lines if line["kind"] == "measured"}
    table = json.loads(found.render("json"))["tables"][0]
    for row, reported in zip(table["rows"], summarise(_nasty()), strict=True):
        for name, one in row["metrics"].items():
            line = measured[row["row"], name]
            assert one == reported["metrics"][name]
            assert (float(line["mean"]), float(line["sd"]), int(line["n"])) == tuple(one.values())
    test = table["rows"][1]["against_baseline"]["last"]
    assert float(measured["naive", "last"]["p_holm"]) == test["p_holm"] and measured["ours", "last"]["p"] == ""
    printed = [line for line in lines if line["kind"] == "printed"]
    missing = [line for line in printed if line["number"] == "StreamForwardTransfer"]
    assert missing and all(line["mean"] == "" for line in missing)
    [published] = [line for line in lines if line["kind"] == "published"]
    assert float(published["difference"]) == pytest.approx(0.005) and published["source"] == NASTY


def _cells(page: str) -> list[str]:
    return [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)]


def test_the_page_shows_the_numbers_of_the_results(tmp_path: Path) -> None:
    content = results()
    page = compare(folder(tmp_path / "a", content)).render("html")
    cells = _cells(page)
    for run in content["runs"]:
        last = 100 * np.mean([run["correct"][1][0] / 100, run["correct"][1][1] / 50])
        assert f"{last:.2f}" in cells
    # the same text as the table of the run's own page
    reported = format_table(summarise(content))
    for name in ("Last % (task mean)", "Average % (task mean)", "Forgetting (points)"):
        place = reported.columns.index(name)
        assert name in cells and all(row[place] in cells for row in reported.rows)


@pytest.mark.parametrize("content", [_nasty(), language_results()], ids=["classes", "language"])
def test_the_page_stands_alone_and_escapes(content: dict[str, Any], tmp_path: Path) -> None:
    page = compare(folder(tmp_path / "a<b>", content), baseline=None).render("html")
    assert "default-src 'none'" in page and "<script" not in page and "<b>" not in page
    assert not re.search(r"""src\s*=|href\s*=(?!"#)|url\(|@import""", page)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers) > 4
    assert "prefers-color-scheme:dark" in page and "<svg" in page


def test_two_streams_and_a_projects_numbers_on_one_page(tmp_path: Path) -> None:
    other = results()
    other["stream"]["name"] = "cars"
    paths = [folder(tmp_path / "a"), folder(tmp_path / "b", other), folder(tmp_path / "c", language_results())]
    found = compare(paths, printed_as="libcontinual")
    for form in FORMATS:
        text = found.render(form)  # type: ignore[arg-type]
        assert "cars, class-incremental" in text and "[Batch] Last Average Acc" in text.replace("\\[", "[").replace(
            "\\]", "]"
        )
        assert form in ("csv", "json") or "2 tasks" in text
    assert "prints accuracies, and these runs have none" in found.render("markdown")
    page = found.render("html")
    assert "Paired tests in full" not in page and len(set(re.findall(r'id="(chart\d+)-title"', page))) == 5


def test_files_are_written_by_their_suffix(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "a"))
    for form, suffix in FORMATS.items():
        path = found.write(tmp_path / f"out{suffix}")
        assert path.read_text(encoding="utf-8") == found.render(form)  # type: ignore[arg-type]
    assert found.write(tmp_path / "table.txt", "markdown").read_text(encoding="utf-8") == found.render("markdown")
    with pytest.raises(OptionError, match=r"no format has the suffix '.pdf'"):
        found.write(tmp_path / "out.pdf")
    with pytest.raises(DataError, match="its folder does not exist"):
        found.write(tmp_path / "absent" / "out.md")
    with pytest.raises(OptionError, match="there is no format 'word'"):
        found.render("word")  # type: ignore[arg-type]
    assert found._repr_markdown_() == found.render("markdown")
