"""Which rows a request to forget means: by label, task, a column's value, a text in the row, a predicate, or as given.

A row that was kept for validation is known as it came. One in a buffer is known as it was encoded: its text is what
its tokens decode to, and columns that no encoding holds are not known any more.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from everlora.backbones import Backbone
from everlora.errors import DataError, OptionError
from everlora.streams import Examples, parse_row

__all__ = ["Condition", "Selection", "Where"]

Row = Mapping[str, Any]
Where = str | Callable[[Row], bool]

_COLUMN = re.compile(r"([A-Za-z_][\w.-]*)?=(.*)", re.DOTALL)
_DECODED = "decoded"
_OF_TOKENS = (None, "text", "output")  # compared with decoded tokens: any text of a row, or these columns
_BLOCKS = (
    "Plain texts are kept in blocks of tokens, each looked at on its own: a text that the border of two blocks cuts is "
    "not found, and other blocks of the same text stay."
)
_UNKNOWN_WORDS = (
    "The tokenizer does not know a word of the text to look for, so rows that are kept as tokens cannot be told by it; "
    "give the rows themselves."
)


@dataclass
class Condition:
    """A text contained in the row, `column=value`, or a predicate; case and the kind of space do not matter to texts.

    `=text` looks for a text whatever signs of equality it has.

    Args:
        where: see above.
        tokenizer: of the model, None for images.

    Raises:
        OptionError: there is nothing to look for.
    """

    where: Where
    tokenizer: Any = None
    column: str | None = field(init=False, default=None)
    value: str = field(init=False, default="")
    is_findable: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._forms: set[str] = set()
        if not isinstance(self.where, str):
            return
        found = _COLUMN.fullmatch(self.where)
        self.column, self.value = (found[1], found[2]) if found else (None, self.where)
        if not self.value.strip():
            raise OptionError(f"where={self.where!r} says nothing to look for; give column=value or a text of the row.")
        self._forms = {_plain(self.value)}
        if self.tokenizer is not None:
            # A tokenizer may change a text: what it made of the rows, it makes of the text to look for.
            tokens = self.tokenizer.encode(self.value, add_special_tokens=False)
            self.is_findable = getattr(self.tokenizer, "unk_token_id", None) not in tokens
            if self.is_findable:
                self._forms |= {_plain(self.tokenizer.decode(tokens))} - {""}

    def holds(self, row: Row) -> bool | None:
        """Whether a row is meant; None where the row does not know."""
        if not isinstance(self.where, str):
            return bool(self.where(row))
        if self.column is not None:
            value = row.get(self.column)
            if value is None or isinstance(value, np.ndarray):
                return None
            return str(value) == self.value or (_DECODED in row and _plain(str(value)) in self._forms)
        texts = [_plain(text) for text in _texts(row)]
        return any(form in text for text in texts for form in self._forms) if texts else None


@dataclass
class Selection:
    """The rows that all conditions of a request mean.

    Attributes:
        backbone: encodes and decodes.
        names: of the learner's tasks.
        classes: label names by class index.
        label: rows of this class.
        task: rows of the task of this number.
        condition: see `Condition`.
        rows: rows that equal one of these.
        unknown: how many rows in a buffer, of all looked at in one go, did not know what `condition` asks for.
        unknown_kept: how many validation rows did not.
    """

    backbone: Backbone
    names: list[str]
    classes: list[str]
    label: str | None = None
    task: int | None = None
    condition: Condition | None = None
    rows: Examples | None = None
    unknown: int = 0
    unknown_kept: int = 0

    def __post_init__(self) -> None:
        self._inputs: set[bytes] = set()
        self._encoded: set[bytes] = set()
        self._has_blocks = False
        if self.rows is not None:
            self._inputs = {_key(_kept_content(self.rows, place)) for place in range(len(self.rows))}
            encoded = self.backbone.encode(self.rows.inputs, self.rows.ids)
            self._encoded = {_key(value) for value in _encodings(encoded)}

    @property
    def whole_classes(self) -> frozenset[tuple[int, int]]:
        """`(task, class index)` of the classes of which nothing is to be left; none where single rows are meant."""
        if self.condition is not None or self.rows is not None:
            return frozenset()
        tasks = range(len(self.names)) if self.task is None else (self.task,)
        numbers = [i for i, name in enumerate(self.classes) if self.label in (None, name)]
        return frozenset((task, number) for task in tasks for number in numbers)

    @property
    def remarks(self) -> list[str]:
        """Sentences on rows that could not be looked at."""
        found = []
        for count, where in ((self.unknown, "rows in a buffer"), (self.unknown_kept, "validation rows")):
            if count and self.condition is not None:
                asked = "text" if self.condition.column is None else f"column '{self.condition.column}'"
                found.append(f"There is no {asked} to look at in {count} of the {where}: they stay; give the rows.")
        if self._has_blocks:
            found.append(_BLOCKS)
        if self.condition is not None and self.condition.column in _OF_TOKENS and not self.condition.is_findable:
            found.append(_UNKNOWN_WORDS)
        return found

    def of_kept(self, examples: Examples, task: int) -> Any:
        """Which validation rows of a task are meant, `(n,)` bool; None for a task that is not known any more."""
        goes = np.zeros(len(examples), dtype=bool)
        if self.task not in (None, task):
            return goes
        name = self.names[task] if 0 <= task < len(self.names) else ""
        for place in range(len(examples)):
            label = None if examples.labels is None else str(examples.labels[place])
            if self.label not in (None, label):
                continue
            if self.rows is not None and _key(_kept_content(examples, place)) not in self._inputs:
                continue
            row = {**_kept_row(examples, place), "label": label, "task": name}
            answer = True if self.condition is None else self.condition.holds(row)
            goes[place] = bool(answer)
            self.unknown_kept += answer is None
        return goes

    def of_encoded(self, rows: Any, labels: Tensor, tasks: Tensor) -> Any:
        """Which rows of a buffer are meant, `(n,)` bool.

        Args:
            rows: encoded.
            labels: `(n,)` class indices; for a language model, whose rows have none, anything.
            tasks: `(n,)` numbers of their tasks.
        """
        goes, unknown = np.zeros(len(rows), dtype=bool), 0
        for place, encoding in enumerate(_encodings(rows)):
            label, task = int(labels[place]), int(tasks[place])
            name = self.classes[label] if label < len(self.classes) else None
            if self.task not in (None, task) or self.label not in (None, name):
                continue
            if self.rows is not None and _key(encoding) not in self._encoded:
                continue
            answer = self._answer(rows, place, name, task)
            goes[place], unknown = bool(answer), unknown + (answer is None)
        self.unknown = max(self.unknown, unknown)
        return goes

    def _answer(self, rows: Any, place: int, label: str | None, task: int) -> bool | None:
        """What the condition says of a row; None where the row does not know."""
        if self.condition is None:
            return True
        row: dict[str, Any] = {"row": int(rows.ids[place]) + 1, "label": label}
        row["task"] = self.names[task] if 0 <= task < len(self.names) else None
        return self.condition.holds({**row, **self._content(rows, place)})

    def _content(self, rows: Any, place: int) -> dict[str, Any]:
        if hasattr(rows, "images"):
            return {"image": rows.images[place]}
        tokenizer: Any = self.backbone.inputs.tokenizer  # type: ignore[union-attr]
        tokens = rows.row(place).tolist()
        content = {"text": tokenizer.decode(tokens, skip_special_tokens=True), _DECODED: True}
        if hasattr(rows, "prompt_lengths"):
            prompt = int(rows.prompt_lengths[place])
            self._has_blocks |= prompt <= 1 and self.condition is not None and self.condition.column is None
            if prompt > 1:
                content["output"] = tokenizer.decode(tokens[prompt:], skip_special_tokens=True)
        return content


def _kept_row(examples: Examples, place: int) -> dict[str, Any]:
    number = int(examples.ids[place]) + 1  # as messages count rows
    if examples.modality == "image":
        return {"image": examples.inputs[place], "row": number}
    if examples.modality == "text":
        return {"text": examples.inputs[place], "row": number}
    try:
        return {"row": number, **parse_row(str(examples.inputs[place]))}
    except DataError:
        return {"text": examples.inputs[place], "row": number}


def _kept_content(examples: Examples, place: int) -> Any:
    """What makes a row the same as another: of a language row its texts, without its id and possible answers."""
    if examples.modality != "language":
        return examples.inputs[place]
    row = {key: value for key, value in _kept_row(examples, place).items() if key not in ("row", "id", "label_set")}
    return json.dumps(row, sort_keys=True)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row, names of tasks and labels left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("label", "task", "label_set", "role"):
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _encodings(rows: Any) -> Iterator[Any]:
    for place in range(len(rows)):
        yield rows.images[place] if hasattr(rows, "images") else rows.row(place)


def _key(value: Any) -> bytes:
    """A short stand-in for a text, an image or a row of tokens."""
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
    shape = "" if isinstance(value, str) else repr(np.shape(value))
    return hashlib.blake2b(data, digest_size=16, key=shape.encode()).digest()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
