"""Reading data files and folders into tables, without leaving anything behind in them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from everlora.errors import DataError, nearest
from everlora.streams.images import IMAGE_SUFFIXES
from everlora.streams.table import (
    Column,
    Source,
    Table,
    join_tables,
    table_from_arrow,
    table_from_dataset,
    table_from_rows,
)

__all__ = ["DATA_SUFFIXES", "SPLIT_NAMES", "read_path", "split_name"]

_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_TEXT_SUFFIX = ".txt"
DATA_SUFFIXES = (*_TABLE_SUFFIXES, _TEXT_SUFFIX)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_LABEL_COLUMN, _IMAGE_COLUMN, _TEXT_COLUMN = "label", "image", "text"


def split_name(name: str) -> str | None:
    """Return the split that a file or folder name such as `train-00000-of-00002` or `dev` stands for, or None."""
    return SPLIT_NAMES.get(re.split(r"[-_.]", name.lower(), maxsplit=1)[0])


def read_path(path: Path) -> Source:
    """Read a data file, a folder of data files, a folder of images or a folder of plain texts.

    A plain text is one row. In a folder, `.txt` files count only beside neither tables nor images, whose notes they
    may be.

    Args:
        path: an existing file or folder.

    Returns:
        Its splits.

    Raises:
        DataError: the file type is not known, the file is broken, or the folder holds no data.
    """
    if path.is_file():
        return Source({"train": _read_file(path)}, is_divided=False)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path)
    for folder in (path, path / "data"):
        files = _data_files(folder)
        if files:
            return _read_files(folder, files)
    divided = {split_name(child.name): child for child in _folders(path) if child.name.lower() in SPLIT_NAMES}
    if divided:
        return _read_divided(path, {split: child for split, child in divided.items() if split is not None})
    texts = _text_files(path)
    if texts:
        return _read_files(path, texts)
    return Source({"train": _read_image_folder(path, _class_folders(path))}, is_divided=False)


def _read_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
        _TEXT_SUFFIX: _read_plain_text,
    }
    if suffix in IMAGE_SUFFIXES:
        raise DataError(f"{path} is an image; give the folder that holds it")
    if suffix not in readers:
        raise DataError(f"{path} is not a data file everlora can read; {nearest(suffix or path.name, DATA_SUFFIXES)}")
    return readers[suffix](path)


def _read_parquet(path: Path) -> Table:
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({_reason(error)}); write it anew") from error
    return table_from_arrow(table, str(path), folder=path.parent)


def _read_csv(path: Path) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=delimiter), [])
        if not names:
            raise DataError(f"{path} is empty; its first line must name the columns")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"{path} has two columns named '{repeated[0]}'; rename one")
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            # Types are found below: Arrow's own guesses turn labels such as 007, true or 2024-01-01 into other things.
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, check_utf8=True
            ),
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a table ({_reason(error)}); check quotes, columns, separator"
        ) from error
    columns = {name: _typed(table.column(name)) for name in table.column_names}
    return Table(origin=str(path), columns=columns, num_rows=table.num_rows, folder=path.parent)


def _typed(column: Any) -> Column:
    """Take a column of strings as numbers where nothing is lost by it, as texts otherwise."""
    for kind, dtype in (("integer", pa.int64()), ("float", pa.float64())):
        try:
            numbers = column.cast(dtype)
        except pa.ArrowException:
            continue
        if kind == "float" or pyarrow.compute.all(pyarrow.compute.equal(numbers.cast(pa.string()), column)).as_py():
            return Column("integer" if kind == "integer" else "float", numbers)
        break
    return Column("text", column)


def _read_json_lines(path: Path) -> Table:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON ({_reason(error)}); correct it") from error
    return table_from_rows(rows, str(path), folder=path.parent)


def _read_json(path: Path) -> Table:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return _read_json_lines(path)
        raise DataError(f"{path} is not JSON ({_reason(error)}); correct it") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{path} holds no list of rows; write a list of objects, or one object per line in a .jsonl")
    return table_from_rows(content, str(path), folder=path.parent)


def _read_plain_text(path: Path) -> Table:
    return Table(str(path), {_TEXT_COLUMN: Column("text", [_read_text(path)])}, 1, path.parent)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _read_saved(path: Path) -> Source:
    """Read what `save_to_disk` of the datasets library wrote."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # that library raises whatever its parsers raise
        raise DataError(f"{path} is not a data set that can be loaded ({_reason(error)}); save it anew") from error
    if isinstance(saved, datasets.DatasetDict):
        tables = {str(name): table_from_dataset(part, f"{path} ({name})") for name, part in saved.items()}
        return Source({SPLIT_NAMES.get(name.lower(), name): table for name, table in tables.items()}, is_divided=True)
    return Source({"train": table_from_dataset(saved, str(path))}, is_divided=False)


def _read_files(folder: Path, files: list[Path]) -> Source:
    shards: dict[str, list[Path]] = {}
    for file in files:
        split = split_name(file.stem)
        if split is not None:
            shards.setdefault(split, []).append(file)
    if not shards:
        return Source({"train": join_tables([_read_file(file) for file in files], str(folder))}, is_divided=False)
    tables = {
        split: join_tables([_read_file(file) for file in members], f"{folder} ({split})")
        for split, members in shards.items()
    }
    return Source(tables, is_divided=True)


def _read_divided(path: Path, folders: dict[str, Path]) -> Source:
    """Read a folder with one sub-folder per split, each of data files or of class folders."""
    files = {split: _data_files(folder) or _text_files(folder) for split, folder in folders.items()}
    if all(files.values()):
        tables = {
            split: join_tables([_read_file(file) for file in members], str(folders[split]))
            for split, members in files.items()
        }
        return Source(tables, is_divided=True)
    # One list of classes for all splits, so that a class without test images does not shift the others.
    classes = sorted({name for folder in folders.values() for name in _class_folders(folder)})
    return Source(
        {split: _read_image_folder(folder, classes) for split, folder in folders.items()},
        is_divided=True,
    )


def _read_image_folder(folder: Path, classes: list[str]) -> Table:
    """Read class folders of images, or, without any, the images that lie in the folder itself (unlabelled)."""
    if not classes:
        paths = _image_files(folder)
        if not paths:
            raise DataError(f"{folder} holds neither data files ({', '.join(DATA_SUFFIXES)}) nor folders of images")
        return Table(str(folder), {_IMAGE_COLUMN: Column("image", paths)}, len(paths), folder)
    paths, labels = [], []
    for index, name in enumerate(classes):
        members = _image_files(folder / name)
        paths += members
        labels += [index] * len(members)
    columns = {_IMAGE_COLUMN: Column("image", paths), _LABEL_COLUMN: Column("class", labels, tuple(classes))}
    return Table(str(folder), columns, len(paths), folder)


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [file for file in _visible(folder) if file.is_file() and file.suffix.lower() in _TABLE_SUFFIXES]
    return [file for file in files if not file.name.startswith("dataset_info")]


def _text_files(folder: Path) -> list[Path]:
    files = [file for file in _visible(folder) if file.is_file() and file.suffix.lower() == _TEXT_SUFFIX]
    return [] if files and _image_files(folder) else files


def _class_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in _folders(folder) if _image_files(child))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != ".")
    return sorted(file.absolute() for file in found)  # a table's relative paths are read from the table's folder


def _folders(folder: Path) -> list[Path]:
    return [child for child in _visible(folder) if child.is_dir()]


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.name[0] not in "._")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
