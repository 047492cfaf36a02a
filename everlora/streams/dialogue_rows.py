"""One row of instruction, chat or plain-text data as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from everlora.errors import DataError

__all__ = ["check_row", "parse_row", "write_row"]

_KINDS = ("text", "instruction", "messages")
_TEXTS = ("text", "instruction", "input", "output")


def parse_row(text: str) -> dict[str, Any]:
    """Read one row of language data.

    Args:
        text: a JSON object with `text`, with `instruction` and perhaps `input` and `output`, or with `messages`, each
            perhaps with `label_set` and `id`.

    Returns:
        The object; `input` is there beside every `instruction`, `""` where the row had none.

    Raises:
        DataError: it is no such object; the message names the field.
    """
    try:
        row = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        found = f"{text[:40]!r}" if isinstance(text, str) else f"a {type(text).__name__}"
        raise DataError(f"the row is no JSON object, but {found}; load the data with load_dialogues") from error
    try:
        result = check_row(row)
    except DataError as error:
        raise DataError(f"the row {error}") from error
    if "instruction" in result:
        result.setdefault("input", "")
    return result


def write_row(row: Mapping[str, Any]) -> str:
    """Write a row so that equal rows give equal strings."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True)


def check_row(row: Any) -> dict[str, Any]:
    """Check what a row holds.

    Args:
        row: what may be a row, as an object.

    Returns:
        The row itself.

    Raises:
        DataError: it is none; the message is the end of a sentence that begins with which row it is.
    """
    if not isinstance(row, dict):
        raise DataError(f"is a {type(row).__name__}; write an object that maps names to values")
    kinds = [kind for kind in _KINDS if kind in row]
    if len(kinds) != 1:
        found = " and ".join(f"'{kind}'" for kind in kinds) or "none of them"
        raise DataError(f"must have one of 'text', 'instruction' and 'messages', but has {found}; keep one")
    for name in _TEXTS:
        if name in row and not isinstance(row[name], str):
            raise DataError(f"has a {type(row[name]).__name__} in '{name}'; write a text")
    if "messages" in row:
        _check_messages(row["messages"])
    labels = row.get("label_set", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError("has a 'label_set' that is no list of texts; write the possible answers as a list")
    try:
        write_row(row).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError("holds half of a surrogate pair, which is no character; remove it") from error
    return row


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("has 'messages' that are no list of turns; write [{'role': ..., 'content': ...}, ...]")
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        for name in ("role", "content"):
            if not isinstance(fields.get(name), str):
                raise DataError(f"has no text as '{name}' of message {number}; write {{'role': ..., 'content': ...}}")
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        raise DataError("has an answer of the assistant and no message before it; add the user's message")
