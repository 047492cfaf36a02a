"""The files `everlora predict` reads and writes: a table whose rows keep their order and their other columns."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from everlora.cli.destinations import check_file, writing
from everlora.errors import DataError, nearest
from everlora.store import LearnerStore
from everlora.streams import Columns, Examples, load_dialogues, load_examples
from everlora.streams.columns import find_columns, read_texts
from everlora.streams.files import read_path
from everlora.streams.table import Column

if TYPE_CHECKING:
    from everlora.learner import Learner

__all__ = ["InputTable", "check_output", "read_inputs", "read_table", "titles", "write_table"]

OUTPUT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

_MOST_CHARACTERS = 2**31 - 1  # of a cell: the most that the csv module takes on every platform

Ranked = Sequence[tuple[str, float]] | str
"""Labels with their scores, best first, or a text."""


@dataclass(frozen=True, eq=False)
class InputTable:
    """Rows as they stood in a file.

    Attributes:
        names: the columns, in the file's order.
        rows: one mapping per row.
        arrow: the same as an Arrow table where the file was one, so that its types survive.
    """

    names: tuple[str, ...]
    rows: list[dict[str, Any]]
    arrow: Any = None


def check_output(path: Path) -> None:
    """Refuse a file that could not be written later, before any work is done.

    Raises:
        DataError: another suffix than the four known ones, the folder does not exist, `path` is one itself, or
            nothing can be written there.
    """
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise DataError(f"{path}: cannot write a '{path.suffix}' file; {nearest(path.suffix, OUTPUT_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: its folder does not exist; make it, or give another --output.")
    check_file(path, "--output")


def read_table(path: Path) -> InputTable:
    """Read every row and column of a data file, or list the images of a folder.

    Args:
        path: CSV, TSV, JSON, JSON Lines or Parquet file, or a folder of images.

    Returns:
        The rows in the file's order; cells of CSV and TSV stay the strings they are.

    Raises:
        DataError: there is no such file, it cannot be read, or it is a folder divided into splits.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check --input.")
    source = read_path(path)
    if source.is_divided:
        raise DataError(f"{path} is divided into {', '.join(source.tables)}; give the one file or folder to label.")
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        return _read_delimited(path)
    table = source.tables["train"]
    names = tuple(table.columns)
    lists = [_values(column) for column in table.columns.values()]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
    is_parquet = path.is_file() and path.suffix.lower() == ".parquet"
    return InputTable(names, rows, pyarrow.parquet.read_table(path, partitioning=None) if is_parquet else None)


def _values(column: Column) -> list[Any]:
    """The values of a column; a class by its name, because its index means nothing outside the file."""
    names = column.class_names
    return column.to_list() if names is None else [None if i is None else names[i] for i in column.to_list()]


def _read_delimited(path: Path) -> InputTable:
    csv.field_size_limit(_MOST_CHARACTERS)  # of the whole process; without it a document in a cell is refused
    with path.open(encoding="utf-8-sig", newline="") as file:
        filled = dropwhile(lambda line: not line.strip("\r\n"), file)  # as where rows to learn from are read
        reader = csv.DictReader(filled, delimiter=_delimiter(path))
        return InputTable(tuple(reader.fieldnames or ()), list(reader))


def read_inputs(path: Path, learner: Learner, named: Mapping[str, str] | None) -> Examples | list[str]:
    """Read what the learner shall label, one input for each row of `read_table`.

    Args:
        path: as for `read_table`.
        learner: says whether it wants texts or images, and which columns it was told to read.
        named: the `text` or `image` column of this file, where it has another name.

    Raises:
        DataError: the column is missing or holds something else.
    """
    modality = learner.backbone.modality
    if modality == "language":
        return load_dialogues(path, columns=_columns_of(learner) | dict(named or {}), require_answers=False)
    known = {key: name for key, name in _columns_of(learner).items() if key == modality}
    columns = Columns.from_mapping(known | dict(named or {}))
    if modality == "text":
        # Only the texts are read: a half-filled column of labels is no reason to refuse a file of inputs.
        table = read_path(path).tables["train"]
        found = find_columns(table, columns, modality=modality, require_labels=False)
        return list(read_texts(table, found.input))
    size = learner.backbone.image_size
    return load_examples(path, columns=columns, modality=modality, require_labels=False, image_size=size)


def _columns_of(learner: Learner) -> dict[str, str]:
    return dict(LearnerStore.open(learner.path).header["columns"])


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def titles(table: InputTable, given: Examples | Sequence[str]) -> list[str]:
    """What to call each row on the screen: its text, or the file of its image."""
    if not isinstance(given, Examples):
        return list(given)
    return [str(_cell(row[table.names[0]])) for row in table.rows]


def write_table(
    path: Path, table: InputTable, answers: Sequence[Ranked], chosen: Sequence[str | None] | None = None
) -> list[str]:
    """Write the rows with their labels and scores added, all at once: a reader never sees half a file.

    Args:
        path: the file; its suffix decides the format. An older one is replaced.
        table: the rows.
        answers: for each row its labels with scores, best first, at least one; or the text that was written.
        chosen: the label that each row gets, None for *none of these*; the best one by default.

    Returns:
        The names of the added columns: `label` and `score`, then `label_2`, `score_2` and so on, or `answer`; with
        `chosen`, `best_label`, too, the label whose score it is; with `predicted_` before them where the file has one
        of these names already.

    Raises:
        DataError: the rows cannot be written in this format, or the disk refuses.
    """
    columns = _added_columns(table.names, answers, chosen)
    writers: dict[str, Callable[[Any], None]] = {
        ".parquet": lambda file: _write_parquet(file, table, columns),
        ".jsonl": lambda file: _write_json_lines(file, table, columns),
        ".csv": lambda file: _write_delimited(file, table, columns, ","),
        ".tsv": lambda file: _write_delimited(file, table, columns, "\t"),
    }
    suffix = path.suffix.lower()
    with writing(path, "--output"):
        _replace_file(path, writers[suffix], is_binary=suffix == ".parquet")
    return list(columns)


def _added_columns(
    taken: Sequence[str], answers: Sequence[Ranked], chosen: Sequence[str | None] | None
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    texts = [answer for answer in answers if isinstance(answer, str)]
    labels = [() if isinstance(answer, str) else answer for answer in answers]
    if texts:
        columns["answer"] = [answer if isinstance(answer, str) else answer[0][0] for answer in answers]
    for rank in range(0 if texts else max((len(ranked) for ranked in labels), default=1)):
        ending = f"_{rank + 1}" if rank else ""
        pairs = [ranked[rank] if rank < len(ranked) else (None, None) for ranked in labels]
        columns[f"label{ending}"] = [label for label, _ in pairs]
        columns[f"score{ending}"] = [score for _, score in pairs]
        if chosen is not None and not rank:
            columns |= {"label": list(chosen), "best_label": columns["label"]}
    # The file's own labels may be the truth that somebody compares with: they are never overwritten.
    prefix = ""
    while any(prefix + name in taken for name in columns):
        prefix += "predicted_"
    return {prefix + name: values for name, values in columns.items()}


def _replace_file(path: Path, write: Callable[[Any], None], *, is_binary: bool) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with _open(descriptor, is_binary=is_binary) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _usual_mode())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _open(descriptor: int, *, is_binary: bool) -> IO[Any]:
    if is_binary:
        return os.fdopen(descriptor, "wb")
    return os.fdopen(descriptor, "w", encoding="utf-8", newline="")


def _usual_mode() -> int:
    """Permissions a new file gets by the user's mask; temporary files are made readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _merged(table: InputTable, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    added = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row | extra for row, extra in zip(table.rows, added, strict=True)]


def _write_parquet(file: IO[bytes], table: InputTable, columns: dict[str, list[Any]]) -> None:
    try:
        arrow = table.arrow if table.arrow is not None else pa.Table.from_pylist([_as_text(row) for row in table.rows])
    except pa.ArrowException as error:
        raise DataError(f"the rows do not fit a Parquet file ({error}); write .jsonl instead.") from error
    for name, values in columns.items():
        kind = pa.string() if all(value is None for value in values) else None  # a refusal in every row
        arrow = arrow.append_column(name, pa.array(values, kind))
    pyarrow.parquet.write_table(arrow, file)


def _write_json_lines(file: IO[str], table: InputTable, columns: dict[str, list[Any]]) -> None:
    for row in _merged(table, columns):
        file.write(json.dumps(_as_text(row), ensure_ascii=False, default=str) + "\n")


def _write_delimited(file: IO[str], table: InputTable, columns: dict[str, list[Any]], delimiter: str) -> None:
    writer = csv.DictWriter(
        file, [*table.names, *columns], delimiter=delimiter, lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(_as_text(row) for row in _merged(table, columns))


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    """Paths become strings, and an image stored in the table becomes the name it was stored under."""
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict) and "bytes" in value:
        return value.get("path")
    return None if isinstance(value, bytes) else value
