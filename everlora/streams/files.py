"""Reading data files and folders into tables, without leaving anything behind in them."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet

from everlora.errors import DataError, nearest
from everlora.streams.images import IMAGE_SUFFIXES
from everlora.streams.table import Column, Source, Table, join_tables, table_from_arrow, table_from_dataset
from everlora.streams.text_files import read_delimited, read_json, read_json_lines, read_plain_text, reason

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
_LABEL_COLUMN, _IMAGE_COLUMN = "label", "image"
# How the names of texts begin that lie beside data and are none.
_NOTES = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
_MOST_LISTED = 5


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
        DataError: the file type is not known, the file is broken, the folder holds no data, or only some of its files
            or folders are called after splits.
    """
    if path.is_file():
        return Source({"train": _read_file(path)}, is_divided=False)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path)
    for folder in (path, path / "data"):
        files = _data_files(folder)
        if files:
            return _read_files(folder, files)
    divided = _split_folders(path)
    if divided:
        return _read_divided(divided)
    texts = _text_files(path)
    if texts:
        return _read_files(path, texts)
    return Source({"train": _read_image_folder(path, _class_folders(path))}, is_divided=False)


def _read_file(path: Path) -> Table:
    suffix = path.suffix.lower()
    readers = {
        ".csv": read_delimited,
        ".tsv": read_delimited,
        ".json": read_json,
        ".jsonl": read_json_lines,
        ".parquet": _read_parquet,
        _TEXT_SUFFIX: read_plain_text,
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
        raise DataError(f"{path} cannot be read as Parquet ({reason(error)}); write it anew") from error
    return table_from_arrow(table, str(path), folder=path.parent)


def _read_saved(path: Path) -> Source:
    """Read what `save_to_disk` of the datasets library wrote."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # that library raises whatever its parsers raise
        raise DataError(f"{path} is not a data set that can be loaded ({reason(error)}); save it anew") from error
    if isinstance(saved, datasets.DatasetDict):
        tables = {str(name): table_from_dataset(part, f"{path} ({name})") for name, part in saved.items()}
        return Source({SPLIT_NAMES.get(name.lower(), name): table for name, table in tables.items()}, is_divided=True)
    return Source({"train": table_from_dataset(saved, str(path))}, is_divided=False)


def _read_files(folder: Path, files: list[Path]) -> Source:
    shards = _split_files(folder, files)
    if not shards:
        return Source({"train": join_tables([_read_file(file) for file in files], str(folder))}, is_divided=False)
    tables = {
        split: join_tables([_read_file(file) for file in members], f"{folder} ({split})")
        for split, members in shards.items()
    }
    return Source(tables, is_divided=True)


def _split_files(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Share files out to the splits that their names begin with; empty where no name does.

    Raises:
        DataError: a file of data is of no split while others are of one: it would be passed over in silence.
    """
    shards: dict[str, list[Path]] = {}
    others = []
    for file in files:
        split = split_name(file.stem)
        if split is not None:
            shards.setdefault(split, []).append(file)
        elif not (file.suffix.lower() == _TEXT_SUFFIX and file.stem.lower().startswith(_NOTES)):
            others.append(file.name)
    if shards and others:
        found = _listed([file.name for members in shards.values() for file in members])
        raise DataError(
            f"{folder} has files of splits ({found}) and files of none ({_listed(others)}); begin each name with "
            "train, validation or test (train-january.csv), or none of them"
        )
    return shards


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


def _split_folders(path: Path) -> dict[str, Path]:
    """Return the sub-folder of each split; none where one called `train` is a class of images like those beside it.

    Raises:
        DataError: some sub-folders are splits and others with data are not, or a split has two.
    """
    named = [child for child in _folders(path) if child.name.lower() in SPLIT_NAMES]
    others = [child.name for child in _folders(path) if child not in named and _holds_data(child)] if named else []
    if others and not any(_folders(child) or _data_files(child) or _text_files(child) for child in named):
        return {}
    if others:
        raise DataError(
            f"{path} has folders of splits ({', '.join(child.name for child in named)}) and folders of none "
            f"({_listed(others)}); call each train, validation or test, or none of them"
        )
    folders: dict[str, Path] = {}
    for child in named:
        first = folders.setdefault(SPLIT_NAMES[child.name.lower()], child)
        if first is not child:
            raise DataError(f"{path} has two folders of one split, {first.name} and {child.name}; put them into one")
    return folders


def _read_divided(folders: dict[str, Path]) -> Source:
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


def _holds_data(folder: Path) -> bool:
    return bool(_data_files(folder) or _text_files(folder) or _image_files(folder))


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
