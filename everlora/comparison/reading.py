"""Reading the `results.json` of the folders to compare, with one sentence for whatever is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlora.errors import DataError, EverloraError
from everlora.store.files import MAX_JSON_BYTES, load_json, read_bytes

__all__ = ["RunFolder", "read_runs"]

FORMAT = 1
FILE = "results.json"
MOST_NAMED = 3

_OBJECT, _LIST = (dict, "an object"), (list, "a list")
_NEEDED = ("stream", "runs")
_KINDS = {
    **dict.fromkeys(("stream", "streams", "recipe", "settings", "versions", "rows"), _OBJECT),
    **dict.fromkeys(("runs", "seeds", "published", "claims"), _LIST),
}


@dataclass(frozen=True)
class RunFolder:
    """One folder that `run` wrote.

    Attributes:
        name: what it is called in tables; no two folders of a comparison share a name.
        path: where it lies, as it was given.
        results: the content of its `results.json`.
    """

    name: str
    path: Path
    results: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return str((self.results.get("recipe") or {}).get("name") or "")

    @property
    def setting(self) -> str:
        """Name of the recipe's setting."""
        return str((self.results.get("settings") or {}).get("setting") or "")

    @property
    def model(self) -> str:
        """The base model, as the run names it."""
        return str(self.results.get("model") or "")


def read_runs(paths: Sequence[str | Path]) -> list[RunFolder]:
    """Read the results in these folders; a folder given twice is read once.

    Args:
        paths: folders that hold a `results.json`, or such files.

    Raises:
        DataError: no folder was given, or one is missing, holds no results, or its results are damaged, empty or of
            another format.
    """
    if not paths:
        raise DataError("there is nothing to compare; give one or more folders that 'everlora run' wrote.")
    folders: dict[Path, Path] = {}
    for path in paths:
        folder = _folder(Path(path))
        folders.setdefault(folder.resolve(), folder)
    names = _names(list(folders))
    return [RunFolder(name, path, _results(path)) for name, path in zip(names, folders.values(), strict=True)]


def _folder(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: there is no such folder; give a folder that 'everlora run' wrote.")
    if path.is_dir():
        return path
    if path.name != FILE:
        raise DataError(f"{path} is a file, but no {FILE}; give the folder that 'everlora run' wrote.")
    return path.parent


def _results(folder: Path) -> Mapping[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise DataError(_without_results(folder))
    again = f"run the recipe again with --out {folder}"
    try:
        data = read_bytes(file, limit=MAX_JSON_BYTES)
        if not data.strip():
            raise DataError(f"{file} is empty; {again}.")
        results = load_json(data, file)
    except EverloraError as error:
        raise error if isinstance(error, DataError) else DataError(f"{_ended(error)} or {again}.") from error
    found = results.get("format")
    if found != FORMAT:
        what = "no format number" if found is None else f"format {found}"
        raise DataError(f"{file} has {what} where {FORMAT} is expected; {again}, or read it with the version it is of.")
    for name, (kind, words) in _KINDS.items():
        value = results.get(name)
        if not isinstance(value, kind) and (value is not None or name in _NEEDED):
            raise DataError(f"{file} is damaged: '{name}' must be {words}, found {type(value).__name__}; {again}.")
    if not results["runs"]:
        raise DataError(f"{file} holds no finished run; {again}.")
    return results


def _ended(error: EverloraError) -> str:
    return str(error).rstrip(". ")


def _without_results(folder: Path) -> str:
    if (folder / "plan.json").is_file():
        return f"{folder} holds a run that is not finished, without {FILE}; give the same 'everlora run' again."
    below = sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))
    if below:
        named = ", ".join(below[:MOST_NAMED]) + (" and others" if len(below) > MOST_NAMED else "")
        return f"{folder} holds no {FILE}, but its folders {named} do; give those, as in {folder}/*."
    return f"{folder} holds no {FILE}; give a folder that 'everlora run' wrote."


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    names = []
    for folder in folders:
        parts, others = folder.parts, [other.parts for other in folders if other != folder]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names.append("/".join(parts[-length:]).replace("//", "/"))
    return names
