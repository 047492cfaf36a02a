from __future__ import annotations

from typing import Any

import pytest

from everlora.errors import DataError, OptionError
from everlora.streams.columns import Columns, Found, find_columns
from everlora.streams.table import Column, Table

LONG, SHORT = ["where is my parcel now", "my card was lost"], ["a", "b"]


def table(**columns: Any) -> Table:
    kinds = {"str": "text", "int": "integer", "float": "float", "bytes": "image"}
    made = {
        name: values if isinstance(values, Column) else Column(kinds[type(values[0]).__name__], values)  # type: ignore[arg-type]
        for name, values in columns.items()
    }
    return Table("the table", made, 2)


def find(data: Table, require_labels: bool = True, modality: Any = None, **named: str) -> Found:
    return find_columns(data, Columns(**named), modality=modality, require_labels=require_labels)


@pytest.mark.parametrize(
    ("data", "text", "label"),
    [
        (table(utterance=LONG, intent=SHORT), "utterance", "intent"),
        (table(Label=SHORT, Text=LONG), "Text", "Label"),
        (table(phrase=LONG, number=[1, 2]), "phrase", "number"),
        (table(text=SHORT, kind=LONG), "text", "kind"),
        (table(body=LONG, title=SHORT, label=SHORT), "body", "label"),
        (table(text=LONG, label=SHORT, category=SHORT), "text", "label"),
        (table(text=LONG, id=[1, 2], score=[0.5, 1.0], label=SHORT), "text", "label"),
        (table(text=LONG, a=Column("class", [0, 1], ("x", "y")), target=[1, 2]), "text", "a"),
    ],
)
def test_found(data: Table, text: str, label: str) -> None:
    assert find(data) == Found("text", text, label, None)


def test_images_come_before_texts() -> None:
    data = table(image=[b"", b""], caption=LONG, label=[0, 1])
    assert find(data) == Found("image", "image", "label", None)
    assert find(data, modality="text").input == "caption"
    assert find(data, text="caption").modality == "text"
    assert find(table(picture=[b"", b""], kind=SHORT)) == Found("image", "picture", "kind", None)


def test_named_columns_win() -> None:
    data = table(text=LONG, label=SHORT, domain=SHORT, other=LONG)
    assert find(data, text="other", label="domain") == Found("text", "other", "domain", None)
    assert find(data) == Found("text", "text", "label", "domain")
    assert find(data, task="other").task == "other"
    assert find(table(first=LONG, second=LONG), text="first").label == "second"


@pytest.mark.parametrize(
    ("data", "named", "message"),
    [
        (table(text=LONG, label=SHORT), {"label": "labl"}, "no column 'labl'; did you mean 'label'"),
        (table(text=LONG, intent=SHORT, category=SHORT), {}, "'intent', 'category' could be the label.*--label-column"),
        (table(one=LONG, two=LONG, label=SHORT), {}, "'one', 'two' could be the text.*--text-column"),
        (table(one=LONG, two=LONG), {}, r"no label column among its columns \('one', 'two'\)"),
        (table(label=SHORT), {}, "no column of texts"),
        (table(a=[b"", b""], b=[b"", b""], label=SHORT), {}, "'a', 'b' could be the image"),
        (table(id=[1, 2], a=[3, 4], text=LONG), {}, "no label column"),
    ],
)
def test_refused(data: Table, named: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(data, **named)


def test_answers_are_no_labels() -> None:
    texts = [f"what is {index} and {index}" for index in range(40)]
    unique, repeated = [f"it is {index}" for index in range(40)], [f"it is {index % 5}" for index in range(40)]
    assert find(table(question=texts, kind=repeated)).label == "kind"
    with pytest.raises(DataError, match="no label column"):
        find(table(question=texts, answer=unique))


def test_labels_are_not_needed_for_prediction() -> None:
    assert find(table(text=LONG), require_labels=False) == Found("text", "text", None, None)
    assert find(table(text=LONG, intent=SHORT), require_labels=False).label == "intent"
    assert find(table(text=LONG, intent=SHORT, category=SHORT), require_labels=False).label is None


def test_from_mapping() -> None:
    assert Columns.from_mapping({"text": "a", "label": None}) == Columns(text="a")
    assert Columns.from_mapping(None) == Columns()
    with pytest.raises(OptionError, match="did you mean 'label'"):
        Columns.from_mapping({"labels": "a"})
    with pytest.raises(OptionError, match="not by 3"):
        Columns.from_mapping({"label": 3})  # type: ignore[dict-item]
