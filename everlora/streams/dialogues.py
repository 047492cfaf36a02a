"""Instruction, chat and plain-text data: from whatever a user names to rows for a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everlora.errors import DataError, OptionError, nearest
from everlora.streams.columns import Columns, read_groups, read_labels
from everlora.streams.dialogue_columns import FIELDS, field_values, text_of
from everlora.streams.dialogue_rows import check_row, parse_row, write_row
from everlora.streams.examples import Examples, natural_order
from everlora.streams.reading import origin_of, pick_split, read_tables
from everlora.streams.table import Source, Table

__all__ = ["check_dialogue_columns", "load_dialogue_splits", "load_dialogues", "parse_row"]

_LEADS = ("messages", "instruction", "prompt", "text")
_ANSWERS = {"instruction": ("output", "answer"), "prompt": ("answer", "output")}
_SPLITS = ("train", "validation", "test")
Names = Mapping[str, str]


def check_dialogue_columns(columns: Mapping[str, str | None]) -> None:
    """Check names of columns before there is data.

    Raises:
        OptionError: an unknown kind of column, or a name that is no string.
    """
    _names(columns)


def load_dialogues(
    data: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str | None] | Columns | None = None,
    require_answers: bool = True,
) -> Examples:
    """Load one split of a data set for a language model.

    A row has `messages`; or `instruction`, perhaps `input`, and `output`; or `prompt` and `answer`; or `text`: the
    first of these that it fills. Other columns are ignored.

    Args:
        data: a path (CSV, TSV, JSON, JSON Lines, Parquet, a plain text, a folder of these, a saved data set), a hub
            id, a `datasets.Dataset` or `DatasetDict`, a list of dicts, a list of strings, a mapping from split names
            to any of these, or `Examples`. A plain text is one row.
        split: which split; data without splits is returned whole, whatever the name.
        columns: which column is `text`, `instruction`, `input`, `output`, `prompt`, `answer`, `messages`, `label`,
            `label_set`, `id` or `task`: the name of a column, or a format string over columns such as
            `"{question} {choices}"`. Once one of `messages`, `instruction`, `prompt` and `text` is named, the others
            are not looked for. `label` names a column of classes: the answer is the name of the class, `label_set`
            all classes of the source; a `text` beside it is the instruction.
        require_answers: whether a row without an answer is an error. Without, rows may be prompts only, and strings
            are instructions rather than texts to learn.

    Returns:
        The rows, of modality `"language"`, each a line of JSON (see `parse_row`), with ids 0 to n - 1; `groups` where
        there is a task column.

    Raises:
        DataError: the data cannot be found, read or understood; the message names the file, row or column.
        OptionError: `columns` has an unknown key or a value that is no string.
    """
    if isinstance(data, Examples):
        return _checked(data)
    names = _names(columns)
    source = read_tables(_as_rows(data, "text" if require_answers else "instruction"))
    table = pick_split(source.tables, split, origin_of(data)) if source.is_divided else source.tables["train"]
    return _build(table, source, names, require_answers=require_answers)


def load_dialogue_splits(
    data: Any, *, columns: Mapping[str, str | None] | Columns | None = None
) -> dict[str, Examples]:
    """Load every split of a data set for a language model, all with answers.

    Args:
        data: as for `load_dialogues`.
        columns: as for `load_dialogues`.

    Returns:
        `"train"` and, where the source has them, `"validation"` and `"test"`; splits of other names are left out.

    Raises:
        DataError: as for `load_dialogues`, or the source has no train split.
    """
    if isinstance(data, Examples):
        return {"train": _checked(data)}
    names = _names(columns)
    source = read_tables(_as_rows(data, "text"))
    pick_split(source.tables, "train", origin_of(data))
    parts = {split: source.tables[split] for split in _SPLITS if split in source.tables}
    return {split: _build(table, source, names, require_answers=True) for split, table in parts.items()}


def _checked(examples: Examples) -> Examples:
    if not len(examples):
        raise DataError("the set of examples is empty; give at least one row")
    if examples.modality != "language":
        raise DataError(
            f"the examples are of the modality {examples.modality}, but a language model needs instructions, messages "
            "or texts; read the data with load_dialogues"
        )
    return examples


def _names(columns: Mapping[str, str | None] | Columns | None) -> dict[str, str]:
    given = dataclasses.asdict(columns) if isinstance(columns, Columns) else columns or {}
    for key, value in given.items():
        if key not in FIELDS and value is not None:
            raise OptionError(f"'{key}' is not a kind of column of language data; {nearest(str(key), FIELDS)}")
        if value is not None and not isinstance(value, str):
            raise OptionError(f"the {key} column must be given by its name or a format string, not by {value!r}")
    return {key: value for key, value in given.items() if value is not None}


def _as_rows(data: Any, field: str) -> Any:
    """Make dicts of a list of strings; anything else is returned as it is."""
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        return {name: _as_rows(part, field) for name, part in data.items()}
    is_list = isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0
    return [{field: text} for text in data] if is_list and all(isinstance(text, str) for text in data) else data


def _build(table: Table, source: Source, names: Names, *, require_answers: bool) -> Examples:
    if not table.num_rows:
        raise DataError(f"{table.origin} holds no rows; give at least one")
    named = [lead for lead in _LEADS if lead in names]
    leads = named or [lead for lead in _LEADS if lead in table.columns]
    if not leads:
        known = ", ".join(f"'{name}'" for name in table.columns) or "none"
        raise DataError(
            f"{table.origin} has none of the columns 'messages', 'instruction', 'prompt' and 'text', only {known}; "
            "say which column is what, as in columns={'instruction': 'question', 'output': 'answer'}"
        )
    values = _field_columns(table, names, leads, require_answers=require_answers)
    labels, label_set = _read_label_column(table, source, names, require_answers=require_answers)
    if labels is not None:
        values["output"], values["answer"] = labels, [None] * table.num_rows
    inputs = []
    for index in range(table.num_rows):
        fields = {field: column[index] for field, column in values.items()}
        try:
            row = _row(fields, leads, is_labelled="label" in names, require_answers=require_answers)
            inputs.append(write_row(_with_extras(row, fields, label_set)))
        except DataError as error:
            raise DataError(f"{table.origin}: row {index + 1} {error}") from error
    ids = np.arange(table.num_rows, dtype=np.int64)
    return Examples("language", tuple(inputs), labels=None, ids=ids, groups=_groups(table, names))


def _field_columns(table: Table, names: Names, leads: Sequence[str], *, require_answers: bool) -> dict[str, list[Any]]:
    result = {}
    for field in FIELDS:
        if field in ("label", "task") or (field in _LEADS and field not in leads):
            continue
        is_optional = field in ("output", "answer") and not require_answers
        result[field] = field_values(table, field, names.get(field), is_optional=is_optional)
    return result


def _row(
    fields: Mapping[str, Any], leads: Sequence[str], *, is_labelled: bool, require_answers: bool
) -> dict[str, Any]:
    lead = next((lead for lead in leads if fields[lead] is not None), None)
    if lead is None:
        raise DataError(f"has no value for {' or '.join(repr(lead) for lead in leads)}; fill it or drop the row")
    if lead == "messages":
        return _messages_row(fields["messages"], require_answers=require_answers)
    if lead == "text" and not is_labelled:
        return {"text": text_of(fields["text"])}
    given = fields["input"]
    row = {"instruction": text_of(fields[lead]), "input": "" if given is None else text_of(given)}
    choices = _ANSWERS.get(lead, ("output", "answer"))
    answer = next((fields[name] for name in choices if fields[name] is not None), None)
    if answer is not None:
        row["output"] = text_of(answer)
    elif require_answers:
        raise DataError(f"has no '{choices[0]}'; fill it, name the column of answers, or drop the row")
    return row


def _messages_row(messages: Any, *, require_answers: bool) -> dict[str, Any]:
    check_row({"messages": messages})
    if require_answers and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise DataError(f"ends in a message of the role '{role}'; end it with the answer, of the role 'assistant'")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages]}


def _with_extras(row: dict[str, Any], fields: Mapping[str, Any], label_set: Sequence[str] | None) -> dict[str, Any]:
    labels = fields["label_set"] if fields["label_set"] is not None else label_set
    if labels is not None:
        row["label_set"] = list(labels) if isinstance(labels, tuple) else labels
    if fields["id"] is not None:
        row["id"] = text_of(fields["id"])
    return check_row(row)


def _read_label_column(
    table: Table, source: Source, names: Names, *, require_answers: bool
) -> tuple[list[Any] | None, Sequence[str] | None]:
    """Return the answers and the possible answers that a column of classes gives, None where there is no such column.

    Rows to predict on may lack the column or its values, so only its declared classes are read there.
    """
    name = names.get("label")
    if name is None:
        return None, None
    if name not in table.columns:
        if require_answers:
            raise DataError(f"{table.origin} has no column '{name}'; {nearest(name, table.columns)}")
        return None, None
    if not require_answers:
        return None, table.columns[name].class_names
    labels, declared = read_labels(table, name)
    if table.columns[name].class_names is None:
        # Splits may lack classes that others have; what an answer can be does not depend on the split.
        others = [read_labels(part, name)[1] for part in source.tables.values() if name in part.columns]
        declared = natural_order(label for classes in others for label in classes)
    return labels.tolist(), declared


def _groups(table: Table, names: Names) -> Any:
    if "task" in names:
        if names["task"] not in table.columns:
            raise DataError(f"{table.origin} has no column '{names['task']}'; {nearest(names['task'], table.columns)}")
        return read_groups(table, names["task"])
    column = table.columns.get("task")
    is_usable = column is not None and column.kind in ("text", "class", "integer") and None not in column.to_list()
    return read_groups(table, "task") if is_usable else None
