from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from everlora.cli import tables
from everlora.errors import DataError

ANSWERS = [[("refund", 0.75), ("parcel", 0.25)], [("parcel", 0.5), ("refund", 0.5)]]
TOP = [answer[:1] for answer in ANSWERS]


def _csv(path: Path) -> Path:
    path.write_text('id,text,price\n007,"where, is it",1.50\n008,"a ""quote""\nand a line",2.10\n', encoding="utf-8")
    return path


def test_csv_cells_stay_the_strings_they_are(tmp_path: Path) -> None:
    table = tables.read_table(_csv(tmp_path / "in.csv"))
    added = tables.write_table(tmp_path / "out.csv", table, TOP)
    assert added == ["label", "score"]
    assert list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))) == [
        {"id": "007", "text": "where, is it", "price": "1.50", "label": "refund", "score": "0.75"},
        {"id": "008", "text": 'a "quote"\nand a line', "price": "2.10", "label": "parcel", "score": "0.5"},
    ]


def test_the_labels_of_the_file_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,label\na,truth\nb,truth\n")
    added = tables.write_table(tmp_path / "out.jsonl", tables.read_table(tmp_path / "in.csv"), TOP)
    assert added == ["predicted_label", "predicted_score"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0] == {"text": "a", "label": "truth", "predicted_label": "refund", "predicted_score": 0.75}


def test_several_labels_a_row_even_where_fewer_compete(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    table = tables.read_table(tmp_path / "in.jsonl")
    added = tables.write_table(tmp_path / "out.jsonl", table, [ANSWERS[0], TOP[1]])
    assert added == ["label", "score", "label_2", "score_2"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (rows[0]["label_2"], rows[0]["score_2"]) == ("parcel", 0.25)
    assert (rows[1]["label_2"], rows[1]["score_2"]) == (None, None)


def test_refused_rows_have_no_label_and_say_what_was_best(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "best_label": 1}\n{"text": "b", "best_label": 2}\n')
    table = tables.read_table(tmp_path / "in.jsonl")
    added = tables.write_table(tmp_path / "out.parquet", table, ANSWERS, [None, None])
    names = ["label", "score", "best_label", "label_2", "score_2"]
    assert added == [f"predicted_{name}" for name in names]
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.column("predicted_label").to_pylist() == [None, None]
    assert written.schema.field("predicted_label").type == pa.string(), "a column of texts, even if all are refused"
    assert written.column("predicted_best_label").to_pylist() == ["refund", "parcel"]
    assert written.column("predicted_label_2").to_pylist() == ["parcel", "refund"]


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    source = pa.table({"text": ["a", "b"], "size": pa.array([1, 2], pa.int8()), "tags": [["x"], []]})
    pq.write_table(source, tmp_path / "in.parquet")
    tables.write_table(tmp_path / "out.parquet", tables.read_table(tmp_path / "in.parquet"), TOP)
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.select(source.column_names).equals(source)
    assert written.column("label").to_pylist() == ["refund", "parcel"]


def test_a_cell_may_hold_a_whole_document(tmp_path: Path) -> None:
    text = "word " * 40_000
    (tmp_path / "in.csv").write_text(f"id,text\n1,{text}\n")
    assert tables.read_table(tmp_path / "in.csv").rows == [{"id": "1", "text": text}]


def test_blank_lines_before_the_header_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("\n\nid,text\n1,a word\n")
    table = tables.read_table(tmp_path / "in.csv")
    assert table.names == ("id", "text") and table.rows == [{"id": "1", "text": "a word"}]


def test_csv_to_parquet_and_tsv(tmp_path: Path) -> None:
    table = tables.read_table(_csv(tmp_path / "in.csv"))
    tables.write_table(tmp_path / "out.parquet", table, TOP)
    assert pq.read_table(tmp_path / "out.parquet").column("id").to_pylist() == ["007", "008"]
    tables.write_table(tmp_path / "out.tsv", table, TOP)
    assert [row["text"] for row in tables.read_table(tmp_path / "out.tsv").rows] == [row["text"] for row in table.rows]


def test_a_folder_of_images_becomes_one_row_per_file(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    table = tables.read_table(tmp_path)
    assert [Path(row["image"]).name for row in table.rows] == ["a.png", "b.png"]
    tables.write_table(tmp_path / "out.csv", table, TOP)
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == f"{tmp_path / 'a.png'},refund,0.75"


def test_classes_of_folders_are_written_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pets" / name / "1.png")
    assert [row["label"] for row in tables.read_table(tmp_path / "pets").rows] == ["cat", "dog"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out" / "labels.jsonl"
    target.parent.mkdir()
    target.write_text("old")
    broken = tables.InputTable(("text",), [{"text": {1j: "no JSON key"}}])
    with pytest.raises(TypeError):
        tables.write_table(target, broken, TOP[:1])
    assert target.read_text() == "old" and os.listdir(target.parent) == ["labels.jsonl"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    tables.write_table(tmp_path / "out.csv", tables.read_table(_csv(tmp_path / "in.csv")), TOP)
    assert (tmp_path / "out.csv").stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize(
    ("name", "said"), [("out.xlsx", "cannot write a '.xlsx' file"), ("nowhere/out.csv", "its folder does not exist")]
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tables.check_output(tmp_path / name)


def test_input_that_is_not_there_or_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        tables.read_table(tmp_path / "none.csv")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="is divided into"):
        tables.read_table(tmp_path)
