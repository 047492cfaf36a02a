"""Reading files that are text: CSV and TSV, JSON, JSON Lines, plain texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from everlora.errors import DataError
from everlora.streams.table import Column, Table, column_of_cells, table_from_rows

__all__ = ["read_delimited", "read_json", "read_json_lines", "read_plain_text", "reason"]

_TEXT_COLUMN = "text"
_DELIMITERS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}
# A row must lie within two blocks of the parser, whose default of 1 MB is less than some documents have.
_BLOCK_BYTES = 64 * 2**20


def read_delimited(path: Path) -> Table:
    """Read a CSV or TSV file, whose cells stay the strings that are in the file.

    Args:
        path: a file whose first line that is not blank names the columns.

    Returns:
        Its rows, in columns without a type.

    Raises:
        DataError: the file is empty, is not UTF-8, has another separator, or is broken.
    """
    delimiter, described = _DELIMITERS[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
        _check_header(path, names, delimiter, described)
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            # Arrow's own guesses of types turn labels such as 007, true or 2024-01-01 into other things.
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, check_utf8=True
            ),
        )
    except (UnicodeDecodeError, pa.ArrowException, csv.Error, OSError) as error:
        _read_text(path)  # says so, and where, if it is not UTF-8
        raise DataError(
            f"{path} cannot be read as a table ({reason(error)}); check quotes, columns, separator"
        ) from error
    columns = {name: column_of_cells(table.column(name)) for name in table.column_names}
    return Table(origin=str(path), columns=columns, num_rows=table.num_rows, folder=path.parent)


def _check_header(path: Path, names: Sequence[str], delimiter: str, described: str) -> None:
    if not names:
        raise DataError(f"{path} is empty; its first line must name the columns")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has two columns named '{repeated[0]}'; rename one")
    others = [other for other in (";", "\t") if other != delimiter and len(names) == 1 and other in names[0]]
    if others:
        raise DataError(
            f"{path} has the one column {names[0]!r}, so its separator seems to be {others[0]!r}; save it with "
            f"{described} between the columns, or rename that column"
        )


def read_json_lines(path: Path) -> Table:
    """Read one JSON object per line; blank lines are left out.

    Raises:
        DataError: a line is no JSON object; the message has its number.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON ({reason(error)}); correct it") from error
    return table_from_rows(rows, str(path), folder=path.parent)


def read_json(path: Path) -> Table:
    """Read a list of objects, such a list under `"data"`, or JSON Lines.

    Raises:
        DataError: it is none of these.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return read_json_lines(path)
        raise DataError(f"{path} is not JSON ({reason(error)}); correct it") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{path} holds no list of rows; write a list of objects, or one object per line in a .jsonl")
    return table_from_rows(content, str(path), folder=path.parent)


def read_plain_text(path: Path) -> Table:
    """Read a text as one row.

    Raises:
        DataError: it is not UTF-8.
    """
    return Table(str(path), {_TEXT_COLUMN: Column("text", [_read_text(path)])}, 1, path.parent)


def reason(error: BaseException) -> str:
    """Return the first line of another library's complaint, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
