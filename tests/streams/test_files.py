"""Folders: no file and no sub-folder with data is passed over in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everlora.errors import DataError
from everlora.streams import load_examples
from everlora.streams.files import read_path


def write_rows(path: Path, *labels: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"a b,{label}\n" for label in labels))
    return path


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(folder / name / "one.png")


@pytest.mark.parametrize(
    ("named", "left"),
    [
        (["train-tickets.csv"], ["bus-tickets.csv"]),
        (["test.csv"], ["february.csv", "january.csv"]),
        (["test.txt", "train.txt"], ["bus.txt"]),
    ],
)
def test_files_of_no_split_beside_files_of_one_are_named(tmp_path: Path, named: list[str], left: list[str]) -> None:
    for name in named + left:
        write_rows(tmp_path / name, "a", "b")
    message = rf"files of splits \({', '.join(named)}\) and files of none \({', '.join(left)}\); begin each name with"
    with pytest.raises(DataError, match=message):
        read_path(tmp_path)


def test_files_that_the_message_says_to_rename_are_read(tmp_path: Path) -> None:
    for name in ("train-january.csv", "train-february.csv", "test.csv"):
        write_rows(tmp_path / name, name)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert {split: table.num_rows for split, table in read_path(tmp_path).tables.items()} == {"test": 1, "train": 2}


def test_notes_beside_plain_texts_are_no_data(tmp_path: Path) -> None:
    for name in ("train.txt", "README.txt", "licence-of-the-texts.txt", "NOTICE.TXT"):
        (tmp_path / name).write_text(name)
    assert read_path(tmp_path).tables["train"].num_rows == 1


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    write_images(tmp_path / "vehicles", "bus", "car", "train")
    assert load_examples(tmp_path / "vehicles").classes == ("bus", "car", "train")


@pytest.mark.parametrize("kind", ["class folders", "tables"])
def test_folders_of_no_split_beside_folders_of_one_are_named(tmp_path: Path, kind: str) -> None:
    for name in ("train", "bus"):
        if kind == "tables":
            write_rows(tmp_path / name / "rows.csv", "a", "b")
        else:
            write_images(tmp_path / name, "red", "blue")
    with pytest.raises(DataError, match=r"folders of splits \(train\) and folders of none \(bus\); call each train"):
        read_path(tmp_path)


def test_folders_without_data_are_left_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "red", "blue")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make.py").write_text("")
    assert list(read_path(tmp_path).tables) == ["train"]


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "dev", "val"):
        write_images(tmp_path / name, "red", "blue")
    with pytest.raises(DataError, match="two folders of one split, dev and val; put them into one"):
        read_path(tmp_path)


def test_tables_without_types_are_put_together_whatever_their_labels_look_like(tmp_path: Path) -> None:
    write_rows(tmp_path / "january.csv", "12a", "13")
    write_rows(tmp_path / "february.csv", "14", "15")
    assert load_examples(tmp_path).classes == ("12a", "13", "14", "15")


def test_a_table_without_types_and_one_with_them_share_their_labels(tmp_path: Path) -> None:
    write_rows(tmp_path / "january.csv", "13", "14")
    (tmp_path / "march.jsonl").write_text('{"text": "a b", "label": 14}\n')
    examples = load_examples(tmp_path)
    assert examples.labels is not None and examples.labels.tolist() == ["13", "14", "14"]
    assert examples.classes == ("13", "14") and examples.label_kind is None


def test_of_many_files_the_message_names_a_few(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", "a")
    for number in range(20):
        write_rows(tmp_path / f"part-{number:02}.csv", "a")
    with pytest.raises(DataError, match=r"part-03.csv, part-04.csv and 15 more\)"):
        read_path(tmp_path)
