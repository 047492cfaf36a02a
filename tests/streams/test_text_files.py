"""CSV and TSV: cells stay as they are in the file, and what is wrong with a file is said in its own terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlora.errors import DataError
from everlora.streams import Columns, load_dialogues, load_examples, parse_row
from everlora.streams.files import read_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (("1", "-2", "0"), "integer"),
        (("12345678901234567890", "12345678901234567891"), "integer"),
        (("01", "2"), "text"),
        (("-0", "1"), "text"),
        (("1e1", "2E1"), "float"),
        (("1.50", "0.0000001", "3", "+.5", "nan", "-Infinity"), "float"),
        (("true", "1"), "text"),
        (("1_0", "2"), "text"),
        (("nan(x)", "1"), "text"),
        (("", "1"), "text"),
        (("0x1F", "1"), "text"),
        (("1\n", "2"), "text"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cells_stay_what_they_are_whatever_they_look_like(
    tmp_path: Path, cells: tuple[str, ...], kind: str, suffix: str
) -> None:
    delimiter = {".csv": ",", ".tsv": "\t"}[suffix]
    lines = [delimiter.join(pair) for pair in [("text", "cell"), *(("x", f'"{cell}"') for cell in cells)]]
    table = read_path(write(tmp_path / f"rows{suffix}", "\n".join(lines)))
    column = table.tables["train"].columns["cell"]
    assert (column.kind, column.to_list(), column.is_typed) == (kind, list(cells), False)


@pytest.mark.parametrize(
    "labels",
    [
        ("12345678901234567890", "12345678901234567891"),
        ("1e1", "2e1"),
        ("1.0", "1"),
        ("01", "1"),
        ("True", "true"),
        ("1", "2", "10"),
    ],
)
def test_labels_that_differ_in_the_file_are_different_classes(tmp_path: Path, labels: tuple[str, ...]) -> None:
    path = write(tmp_path / "rows.csv", "text,label\n" + "".join(f"a b,{label}\n" for label in labels))
    examples = load_examples(path)
    assert examples.labels is not None and tuple(examples.labels.tolist()) == labels
    assert set(examples.classes) == set(labels)


def test_whole_numbers_are_the_classes_they_were(tmp_path: Path) -> None:
    table = load_examples(write(tmp_path / "rows.csv", "text,label\na,10\nb,9\n"))
    rows = [{"text": "a", "label": 10}, {"text": "b", "label": 9}]
    assert table.fingerprint == load_examples(rows).fingerprint
    assert table.classes == load_examples(rows).classes == ("9", "10")


def test_texts_that_are_numbers_keep_their_digits(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\n1.50,x\n1e5,y\n")
    assert load_examples(path, columns=Columns(text="text")).inputs == ("1.50", "1e5")


def test_a_language_model_is_taught_the_answers_of_the_file(tmp_path: Path) -> None:
    answers = ["2.50", "0.0000001", "3"]
    lines = "".join(f"what is {index}?,{answer}\n" for index, answer in enumerate(answers))
    rows = load_dialogues(write(tmp_path / "rows.csv", "instruction,output\n" + lines))
    assert [parse_row(row)["output"] for row in rows.inputs] == answers


def test_a_long_document_fits_into_a_cell(tmp_path: Path) -> None:
    document = "word, and\nword " * 200_000
    assert len(document) > 2 * 2**20, "more than two of the parser's own blocks"
    path = write(tmp_path / "rows.csv", f'text,label\n"{document}",x\nshort,y\n')
    assert load_examples(path).inputs == (document, "short")


@pytest.mark.parametrize("before", [10, 100_000])
def test_another_encoding_is_named_wherever_it_shows(tmp_path: Path, before: int) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(b"text,label\n" + b"ab,x\n" * before + "å,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"latin.csv is not UTF-8 text \(byte {11 + 5 * before}\); save it as UTF-8"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "text", "separator", "mend"),
    [
        ("rows.csv", "text;label\na b;x\n", "';'", "commas"),
        ("rows.csv", "text;label\na, b;x\n", "';'", "commas"),
        ("rows.csv", "text\tlabel\na b\tx\n", r"'\\t'", "commas"),
        ("rows.tsv", "text;label\na b;x\n", "';'", "tabs"),
    ],
)
@pytest.mark.parametrize("load", [load_examples, load_dialogues])
def test_another_separator_is_named(
    tmp_path: Path, name: str, text: str, separator: str, mend: str, load: object
) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=rf"{name} has the one column .* seems to be {separator}; save it with {mend}"):
        load(path)  # type: ignore[operator]


def test_separators_within_the_names_of_several_columns_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text;free,label\na b,x\n")
    assert load_examples(path, columns=Columns(text="text;free")).inputs == ("a b",)


@pytest.mark.parametrize("blank", ["\n\n", "\r\n", "\ufeff\n"])
def test_blank_lines_before_the_header_are_skipped(tmp_path: Path, blank: str) -> None:
    examples = load_examples(write(tmp_path / "rows.csv", f"{blank}text,label\na b,x\n"))
    assert (examples.inputs, examples.classes) == (("a b",), ("x",))


def test_a_file_of_blank_lines_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.csv is empty; its first line must name the columns"):
        load_examples(write(tmp_path / "rows.csv", "\n\n\n"))
