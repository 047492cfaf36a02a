from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from everlora.errors import DataError
from everlora.streams import Columns, load_examples, load_splits

ROWS = [
    {"text": "where is my parcel", "label": "parcel"},
    {"text": 'my card is, as it seems, "lost"', "label": "card"},
    {"text": "two\nlines", "label": "parcel"},
]


def write_csv(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_image(path: Path, *, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS, stem: str = "data") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{suffix}"
    if suffix in (".csv", ".tsv"):
        datasets.Dataset.from_list(rows).to_pandas().to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_file_type_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix)
    before = sorted(tmp_path.iterdir())
    examples = load_examples(path)
    assert examples.modality == "text"
    assert list(examples.inputs) == [row["text"] for row in ROWS]
    assert examples.labels is not None
    assert examples.labels.tolist() == [row["label"] for row in ROWS]
    assert examples.class_names == ("card", "parcel")
    assert examples.ids.tolist() == [0, 1, 2]
    assert examples.fingerprint == load_examples(ROWS).fingerprint
    assert load_examples(str(path), split="test").fingerprint == examples.fingerprint, "a file has no splits"
    assert sorted(tmp_path.iterdir()) == before, "nothing is left in the data folder"


def test_datasets_objects() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features)
    examples = load_examples(dataset)
    assert examples.class_names == ("zebra", "ant"), "the declared order is kept"
    assert examples.labels is not None
    assert examples.labels.tolist() == ["zebra", "ant", "zebra"]
    chosen = load_examples(dataset.select([2, 1]))
    assert list(chosen.inputs) == ["c", "b"], "indices of the data set are honoured"
    both = load_splits(datasets.DatasetDict({"train": dataset, "validation": dataset.select([0])}))
    assert {name: len(part) for name, part in both.items()} == {"train": 3, "validation": 1}
    assert {name: len(part) for name, part in load_splits({"train": ROWS, "test": ROWS[:1]}).items()} == {
        "train": 3,
        "test": 1,
    }
    assert load_examples(examples) is examples


def test_a_saved_data_set(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert load_examples(tmp_path / "saved").fingerprint == load_examples(ROWS).fingerprint


@pytest.mark.parametrize("layout", ["files", "shards", "data folder", "folders"])
def test_folders_with_splits(tmp_path: Path, layout: str) -> None:
    if layout == "files":
        write_rows(tmp_path, ".csv", ROWS, "train")
        write_rows(tmp_path, ".csv", ROWS[:2], "dev")
        write_rows(tmp_path, ".csv", ROWS[:1], "test")
    elif layout == "shards":
        write_rows(tmp_path, ".parquet", ROWS[:2], "train-00000-of-00002")
        write_rows(tmp_path, ".parquet", ROWS[2:], "train-00001-of-00002")
        write_rows(tmp_path, ".parquet", ROWS[:2], "validation")
        write_rows(tmp_path, ".parquet", ROWS[:1], "test-00000-of-00001")
        (tmp_path / "README.md").write_text("about")
    else:
        root = tmp_path / "data" if layout == "data folder" else tmp_path
        for name, rows in (("train", ROWS), ("validation", ROWS[:2]), ("test", ROWS[:1])):
            folder, stem = (root, name) if layout == "data folder" else (root / name, "part")
            write_rows(folder, ".jsonl", rows, stem)
    splits = load_splits(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "validation": 2, "test": 1}
    assert splits["train"].fingerprint == load_examples(ROWS).fingerprint
    assert load_examples(tmp_path, split="dev").fingerprint == splits["validation"].fingerprint


def test_a_folder_of_monthly_files_is_one_set(tmp_path: Path) -> None:
    write_rows(tmp_path, ".csv", ROWS[:1], "january")
    write_rows(tmp_path, ".csv", ROWS[1:], "february")
    examples = load_examples(tmp_path)
    assert list(examples.inputs) == [ROWS[1]["text"], ROWS[2]["text"], ROWS[0]["text"]], "in order of file names"


def test_a_part_of_a_mapping_that_is_divided_gives_the_split_of_its_name(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_csv(tmp_path / "d" / f"{split}.csv", f"text,label\n{split} row,a\n")
    write_csv(tmp_path / "only" / "test.csv", "text,label\nonly row,a\n")
    loaded = load_splits({"train": tmp_path / "d", "test": tmp_path / "d"})
    assert {split: list(rows.inputs) for split, rows in loaded.items()} == {
        "train": ["train row"],
        "test": ["test row"],
    }
    inner = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "inner row", "label": "a"}])})
    for part, text in ((tmp_path / "only", "only row"), (inner, "inner row")):
        loaded = load_splits({"train": tmp_path / "d" / "train.csv", "test": part})
        assert list(loaded["test"].inputs) == [text]
    with pytest.raises(DataError, match="only has no train split, only test"):
        load_splits({"train": tmp_path / "only"})


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, ".csv", ROWS, "train")
    with pytest.raises(DataError, match="has no test split, only train"):
        load_examples(tmp_path, split="test")
    with pytest.raises(DataError, match="has no train split, only test"):
        load_splits({"test": ROWS})


def test_image_folder_directly_and_with_splits(tmp_path: Path) -> None:
    for index, name in enumerate(["zebra", "ant"]):
        write_image(tmp_path / "flat" / name / "b.png", colour=(index, 0, 0))
        write_image(tmp_path / "flat" / name / "a.jpg", colour=(index, 0, 0))
        write_image(tmp_path / "split" / "train" / name / "a.png", colour=(index, 1, 2))
    write_image(tmp_path / "split" / "test" / "zebra" / "a.png")
    examples = load_examples(tmp_path / "flat")
    assert examples.class_names == ("ant", "zebra")
    assert examples.labels is not None
    assert examples.labels.tolist() == ["ant", "ant", "zebra", "zebra"]
    assert np.asarray(examples.inputs).shape == (4, 4, 6, 3)
    splits = load_splits(tmp_path / "split")
    assert np.asarray(splits["train"].inputs)[:, 0, 0].tolist() == [[1, 1, 2], [0, 1, 2]]
    assert splits["test"].class_names == ("ant", "zebra"), "one class list for all splits"
    unlabelled = load_examples(tmp_path / "flat" / "ant", require_labels=False)
    assert unlabelled.labels is None
    assert len(unlabelled) == 2


def test_images_in_tables(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", colour=(1, 2, 3))
    write_image(tmp_path / "two.png", colour=(4, 5, 6))
    table = write_csv(tmp_path / "table.csv", "file,label\none.png,a\ntwo.png,b\n")
    by_path = load_examples(table, columns=Columns(image="file"))
    content = [(tmp_path / name).read_bytes() for name in ("one.png", "two.png")]
    by_bytes = load_examples([{"image": data, "label": label} for data, label in zip(content, "ab", strict=True)])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in content], "label": ["a", "b"]}, features=features
    )
    arrays = [{"image": np.full((4, 6, 3), [[value]], np.uint8), "label": "a"} for value in ([1, 2, 3], [4, 5, 6])]
    arrays[1]["label"] = "b"
    assert by_path.fingerprint == by_bytes.fingerprint == load_examples(dataset).fingerprint
    assert load_examples(arrays).fingerprint == by_path.fingerprint
    dataset.to_parquet(str(tmp_path / "images.parquet"))
    assert load_examples(tmp_path / "images.parquet").fingerprint == by_path.fingerprint


def test_csv_values_keep_their_spelling(tmp_path: Path) -> None:
    codes = write_csv(tmp_path / "codes.csv", "text,label\na,007\nb,10\n")
    assert load_examples(codes).classes == ("007", "10")
    words = write_csv(tmp_path / "words.csv", "text,label\na,true\nb,NA\nc,2024-01-01\n")
    assert load_examples(words).classes == ("2024-01-01", "NA", "true")
    numbers = write_csv(tmp_path / "numbers.csv", "\ufefftext,label\n1,10\n2,9\n")
    examples = load_examples(numbers, columns=Columns(text="text"))
    assert (list(examples.inputs), examples.classes) == (["1", "2"], ("9", "10"))
    assert examples.label_kind is None, "a CSV has no types"


def test_task_column_becomes_groups() -> None:
    rows = [{**row, "domain": domain} for row, domain in zip(ROWS, "xyx", strict=True)]
    found = load_examples(rows)
    assert found.groups is not None
    assert found.groups.tolist() == ["x", "y", "x"]
    assert load_examples(ROWS).groups is None
    named = load_examples([{**row, "month": 3} for row in ROWS], columns=Columns(task="month"))
    assert named.groups is not None
    assert named.groups.tolist() == ["3", "3", "3"]


def test_labels_may_be_absent_where_allowed() -> None:
    rows = [{"text": row["text"]} for row in ROWS]
    assert load_examples(rows, require_labels=False).labels is None
    with pytest.raises(DataError, match=r"no label column.*--label-column"):
        load_examples(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; its first line"),
        ("text,label\n", "holds no rows"),
        ("text,text\na,b\n", "two columns named 'text'"),
        ("text,label\na,b,c\n", "cannot be read as a table"),
        ("text,label\na,b\nc,\n", "row 2 has no label in column 'label'"),
        ("text,label\na,0.5\n", r"row 1 has the label 0.5 .*names or whole numbers"),
        ("text,label\na,nan\n", "row 1 has the label nan"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_examples(write_csv(tmp_path / "bad.csv", content))
    assert "bad.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no rows"),
        (["a"], "row 1 is a str"),
        ([{"text": "a", "label": True}], "label True"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], "row 2 has no label"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 3}], "row 2 has a number as label .* a name"),
        ([{"text": None, "label": "x"}, {"text": "b", "label": "x"}], "row 1 has no text"),
        ([{"text": "a", "label": ["x"]}], "names or whole numbers"),
        (3, "a int is no data set"),
        ({"x": 1}, "a dict is no data set"),
    ],
)
def test_bad_rows_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_examples(data)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("text,label\nå,b\n".encode("latin-1"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (tmp_path / "object.json").write_text('{"text": "a"}')
    (tmp_path / "notes.doc").write_text("a")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "latin.csv": "UTF-8",
        "broken.parquet": "cannot be read as Parquet",
        "broken.jsonl": "line 2 is not JSON",
        "object.json": "holds no list of rows",
        "notes.doc": "not a data file everlora can read",
        "empty": "holds neither data files",
    }.items():
        with pytest.raises(DataError, match=message):
            load_examples(tmp_path / name)


def test_shards_must_agree(tmp_path: Path) -> None:
    write_rows(tmp_path, ".jsonl", ROWS, "train-0")
    write_rows(tmp_path, ".jsonl", [{"text": "a", "label": 3}], "train-1")
    with pytest.raises(DataError, match=r"train-1.jsonl holds other types .*'label'"):
        load_examples(tmp_path)
    write_rows(tmp_path / "tables", ".csv", ROWS, "train-0")
    write_rows(tmp_path / "tables", ".csv", [{"text": "a", "kind": "b"}], "train-1")
    with pytest.raises(DataError, match=r"train-1.csv has no such column \('label'\)"):
        load_examples(tmp_path / "tables")


def test_what_does_not_exist_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a path must not be looked up on the network")

    monkeypatch.setattr("socket.create_connection", refuse)
    for name in ("data/january.csv", str(tmp_path / "nothing"), "./here", "a/b/c"):
        with pytest.raises(DataError, match="does not exist"):
            load_examples(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="cannot be reached"):
        load_examples("nobody/nothing")


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def unreachable(*address: Any, **_options: Any) -> None:
        calls.append(address)
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", unreachable)
    before = datasets.are_progress_bars_disabled()
    with pytest.raises(DataError, match=r"'nobody/nothing' is neither .* check the spelling"):
        load_examples("nobody/nothing")
    assert len(calls) == 1, "asked once, without retries"
    assert datasets.are_progress_bars_disabled() == before


def test_ready_made_examples_are_checked() -> None:
    digits = load_splits("sklearn:digits")["test"]
    with pytest.raises(DataError, match="examples are images, but texts"):
        load_examples(digits, modality="text")
    with pytest.raises(DataError, match="is empty"):
        load_examples(digits.select([]))
    with pytest.raises(DataError, match="no validation split, only train, test"):
        load_examples("sklearn:digits", split="validation")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("clinc150", {"train": 15000, "validation": 3000, "test": 4500}),
        ("agnews", {"train": 4000, "test": 7600}),
    ],
)
def test_shared_texts(shared: Path, name: str, rows: dict[str, int]) -> None:
    folder = shared / "data" / name
    before = sorted(os.listdir(folder))
    splits = load_splits(folder)
    assert {split: len(part) for split, part in splits.items()} == rows
    assert sorted(os.listdir(folder)) == before
    assert (splits["train"].groups is not None) == (name == "clinc150")


@pytest.mark.slow
def test_clinc150_as_csv_equals_the_parquet(shared: Path, tmp_path: Path) -> None:
    train = load_splits(shared / "data" / "clinc150")["train"]
    assert train.labels is not None
    rows = [{"utterance": text, "intent": label} for text, label in zip(train.inputs, train.labels, strict=True)]
    again = load_examples(write_rows(tmp_path, ".csv", rows))
    assert list(again.inputs) == list(train.inputs)
    assert again.labels is not None
    assert again.labels.tolist() == train.labels.tolist()
    assert again.class_names == tuple(sorted(train.classes))


@pytest.mark.slow
def test_questions_without_labels_are_not_guessed(shared: Path) -> None:
    with pytest.raises(DataError, match="no label column"):
        load_examples(shared / "data" / "gsm8k")
    assert len(load_examples(shared / "data" / "gsm8k", columns=Columns(text="question"), require_labels=False)) == 7473


@pytest.mark.slow
def test_tiny_imagenet_validation(shared: Path, tmp_path: Path) -> None:
    examples = load_examples(shared / "data" / "tiny-imagenet-32px", split="validation", cache=tmp_path)
    assert np.asarray(examples.inputs).shape == (10_000, 32, 32, 3)
    assert len(examples.classes) == 200
