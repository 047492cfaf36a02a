"""Reading instruction, chat and plain-text data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from everlora.errors import DataError, OptionError
from everlora.streams import Columns, concatenate, load_dialogue_splits, load_dialogues, load_examples, parse_row
from everlora.streams.files import read_path

TASKS = [
    {"instruction": "add", "input": "1 2", "output": "3", "source": "school"},
    {"instruction": "say é", "input": "", "output": "é", "source": "school"},
]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def rows_of(data: Any, **options: Any) -> list[dict[str, Any]]:
    return [parse_row(row) for row in load_dialogues(data, **options).inputs]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_pandas().to_csv(path, index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    examples = load_dialogues(write(tmp_path / f"rows{suffix}", TASKS))
    assert examples.inputs == (
        '{"input": "1 2", "instruction": "add", "output": "3"}',
        '{"input": "", "instruction": "say é", "output": "é"}',
    )
    assert examples.modality == "language" and examples.labels is None and examples.ids.tolist() == [0, 1]
    assert examples.fingerprint == load_dialogues(TASKS).fingerprint
    assert load_dialogues(examples) is examples


def test_every_kind_of_row() -> None:
    data = [
        {"prompt": "2+3", "answer": 5},
        {"instruction": "add", "output": "3"},
        {"messages": [{**message, "name": None} for message in CHAT]},
        {"text": "once upon a time"},
        {"prompt": "p", "output": "o"},
        {"instruction": "i", "output": "o", "text": "the whole of it", "id": 7, "label_set": ["o", "n"]},
    ]
    assert rows_of(data) == [
        {"instruction": "2+3", "input": "", "output": "5"},
        {"instruction": "add", "input": "", "output": "3"},
        {"messages": CHAT},
        {"text": "once upon a time"},
        {"instruction": "p", "input": "", "output": "o"},
        {"instruction": "i", "input": "", "output": "o", "id": "7", "label_set": ["o", "n"]},
    ]


def test_messages_in_parquet_and_data_sets(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "be kind"}, *CHAT]}]
    path = write(tmp_path / "rows.parquet", rows)
    assert rows_of(path) == rows_of(datasets.Dataset.from_list(rows)) == rows


def test_columns_by_name_and_by_format() -> None:
    data = [{"question": "1+1", "choices": "2 or 3", "reply": 2, "subject": "sums", "text": "not this"}]
    columns = {"instruction": "{question}? {choices}", "output": "reply", "task": "subject"}
    examples = load_dialogues(data, columns=columns)
    assert [parse_row(row) for row in examples.inputs] == [{"instruction": "1+1? 2 or 3", "input": "", "output": "2"}]
    assert examples.groups is not None and examples.groups.tolist() == ["sums"]
    assert rows_of(data, columns={"text": "{question}\n{reply}"}) == [{"text": "1+1\n2"}]
    assert rows_of(data, columns=Columns(text="question")) == [{"text": "1+1"}]


def test_a_task_column_makes_groups() -> None:
    rows = [{"text": "a", "task": "x"}, {"text": "b", "task": "y"}]
    groups = load_dialogues(rows).groups
    assert groups is not None and groups.tolist() == ["x", "y"]
    assert load_dialogues([*rows, {"text": "c"}]).groups is None


def test_classes_become_answers() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World", "Sports"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    assert rows_of(data) == [{"text": "a"}, {"text": "b"}]
    expected = [
        {"instruction": "a", "input": "", "output": "Sports", "label_set": ["World", "Sports"]},
        {"instruction": "b", "input": "", "output": "World", "label_set": ["World", "Sports"]},
    ]
    assert rows_of(data, columns={"label": "label"}) == expected
    asked = rows_of(data, columns={"instruction": "Topic of: {text}", "label": "label"})
    assert [row["instruction"] for row in asked] == ["Topic of: a", "Topic of: b"]
    # To predict, neither the column nor its values are needed.
    unlabelled = rows_of([{"text": "a"}], columns={"label": "label"}, require_answers=False)
    assert unlabelled == [{"instruction": "a", "input": ""}]
    known = rows_of(data, columns={"label": "label"}, require_answers=False)
    assert known[0] == {"instruction": "a", "input": "", "label_set": ["World", "Sports"]}


def test_classes_without_names_are_those_of_all_splits() -> None:
    data = {"train": [{"text": "a", "kind": "x"}], "test": [{"text": "b", "kind": "y"}]}
    splits = load_dialogue_splits(data, columns={"label": "kind"})
    assert [parse_row(part.inputs[0])["label_set"] for part in splits.values()] == [["x", "y"], ["x", "y"]]


def test_plain_texts(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("To be,\nor not to be.\n")
    (tmp_path / "test.txt").write_text("that is")
    (tmp_path / "LICENSE.txt").write_text("free")
    splits = load_dialogue_splits(tmp_path)
    assert {split: parse_row(part.inputs[0])["text"] for split, part in splits.items()} == {
        "train": "To be,\nor not to be.\n",
        "test": "that is",
    }
    assert rows_of(tmp_path / "test.txt") == [{"text": "that is"}]
    for name in ("train", "test"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for index in range(2):
            (tmp_path / "parts" / name / f"{index}.txt").write_text(f"{name} {index}")
    assert rows_of(tmp_path / "parts", split="test") == [{"text": "test 0"}, {"text": "test 1"}]


def test_notes_beside_tables_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl", TASKS)
    (tmp_path / "a" / "README.txt").write_text("about")
    assert rows_of(tmp_path / "a") == rows_of(TASKS)
    write(tmp_path / "b" / "train" / "rows.jsonl", TASKS)
    (tmp_path / "b" / "README.txt").write_text("about")
    assert list(read_path(tmp_path / "b").tables) == ["train"]


def test_lists_of_strings() -> None:
    assert rows_of(["a", "b"]) == [{"text": "a"}, {"text": "b"}]
    assert rows_of(["a"], require_answers=False) == [{"instruction": "a", "input": ""}]
    splits = load_dialogue_splits({"train": ["a"], "dev": ["b"]})
    assert list(splits) == ["train", "validation"]


def test_prompts_alone() -> None:
    rows = [{"instruction": "add"}, {"messages": CHAT[:1]}, {"prompt": "p", "answer": "a"}, {"text": "t"}]
    assert rows_of(rows, require_answers=False) == [
        {"instruction": "add", "input": ""},
        {"messages": CHAT[:1]},
        {"instruction": "p", "input": "", "output": "a"},
        {"text": "t"},
    ]
    columns = {"instruction": "q", "output": "reply"}
    assert rows_of([{"q": "add"}], columns=columns, require_answers=False) == [{"instruction": "add", "input": ""}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*TASKS, {"instruction": "a"}], "the list of rows: row 3 has no 'output'; fill it"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], "row 2 has no 'answer'"),
        ([*TASKS, {"output": "a"}], "row 3 has no value for 'instruction'; fill it or drop the row"),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], "row 2 ends in a message of the role 'user'; end it"),
        ([{"messages": CHAT[1:]}], "row 1 has an answer of the assistant and no message before it"),
        ([{"messages": []}], "row 1 has 'messages' that are no list of turns"),
        ([{"messages": [{"role": "user"}]}], "row 1 has no text as 'content' of message 1"),
        ([{"messages": "hello"}], "row 1 has 'messages' that are no list of turns"),
        ([{"instruction": ["a"], "output": "b"}], "row 1 has a list in 'instruction'; write a text"),
        ([{"instruction": "a", "output": True}], "row 1 has a bool in 'output'"),
        ([{"instruction": "a", "output": "b", "label_set": "b"}], "row 1 has a 'label_set' that is no list of texts"),
        ([{"text": "half \ud800"}], "row 1 holds half of a surrogate pair"),
        (
            [{"question": "a"}],
            "has none of the columns 'messages', 'instruction', 'prompt' and 'text', only 'question'",
        ),
        (["a", {"text": "b"}], "row 1 is a str"),
        ([], "holds no rows"),
    ],
)
def test_broken_rows_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dialogues(rows)


def test_a_message_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "january.jsonl", [*TASKS, {"instruction": "a"}])
    with pytest.raises(DataError, match=r"january.jsonl: row 3 has no 'output'"):
        load_dialogues(path)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"question": "a"}, OptionError, "'question' is not a kind of column of language data"),
        (Columns(image="a"), OptionError, "'image' is not a kind of column of language data"),
        ({"text": 3}, OptionError, "the text column must be given by its name or a format string"),
        ({"text": "{question"}, OptionError, "the format string '{question' of 'text' cannot be read"),
        ({"text": "questoin"}, DataError, "has no column 'questoin' for 'text'; did you mean 'question'"),
        ({"text": "{question} {replies}"}, DataError, "has no column 'replies' for 'text'"),
        ({"text": "{question} {reply}"}, DataError, "row 2 has no 'reply'"),
        ({"text": "{question} {choices}"}, DataError, "row 1 has a list in 'choices'"),
        ({"instruction": "question", "label": "topic"}, DataError, "has no column 'topic'"),
        ({"text": "question", "task": "topic"}, DataError, "has no column 'topic'"),
        ({"instruction": "question", "output": "reply"}, DataError, "row 2 has no 'output'"),
    ],
)
def test_wrong_columns_are_refused(columns: Any, error: type[Exception], message: str) -> None:
    rows = [{"question": "a", "reply": "b", "choices": ["x"]}, {"question": "c", "choices": ["x"]}]
    with pytest.raises(error, match=message):
        load_dialogues(rows, columns=columns)


def test_rows_can_be_selected_and_joined() -> None:
    first, second = load_dialogues(TASKS), load_dialogues(["a"])
    both = concatenate([first, second])
    assert both.modality == "language" and both.inputs == (*first.inputs, *second.inputs)
    assert both.ids.tolist() == [0, 1, 2] and both.select(np.array([2])).inputs == second.inputs
    texts = load_examples([{"text": "a", "label": "b"}])
    with pytest.raises(DataError, match="rows for a language model and texts cannot be put into one set"):
        concatenate([first.select([0]), texts.__class__("text", ("a",), None, np.zeros(1, np.int64))])
    with pytest.raises(DataError, match="the examples are of the modality text"):
        load_dialogues(texts)
    with pytest.raises(DataError, match="empty"):
        load_dialogue_splits(first.select([]))


def test_parse_row_refuses_what_is_no_row() -> None:
    assert parse_row('{"instruction": "a"}') == {"instruction": "a", "input": ""}
    for row, message in {
        "[1]": "the row is a list",
        '{"text": "a", "messages": []}': "the row must have one of .* but has 'text' and 'messages'; keep one",
        "a b": "the row is no JSON object, but 'a b'",
    }.items():
        with pytest.raises(DataError, match=message):
            parse_row(row)
