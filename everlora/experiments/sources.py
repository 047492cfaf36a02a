"""Where a recipe's examples lie: given by the caller, built in, on the hub, or in a local copy."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from pyarrow import parquet

from everlora.errors import DataError, OptionError
from everlora.experiments.network import hub_copy_is_here, hub_is_reachable
from everlora.experiments.schema import ColumnNames, DataSpec
from everlora.places import SHARED_VARIABLE, shared_folder

__all__ = ["Source", "given_part", "locate"]


@dataclass(frozen=True)
class Source:
    """A place to load from.

    Attributes:
        value: what `load_splits` is given: a path, hub id, built-in name or data in memory.
        columns: column names, `None` to find them by type.
        kind: `given`, `builtin`, `local` (a path that the recipe names), `hub` or `shared`.
    """

    value: Any
    columns: Mapping[str, str] | None
    kind: str

    @property
    def text(self) -> str:
        """One line for the results; machine paths are cut down to the folder's name."""
        is_path = self.kind in ("given", "local", "shared") and isinstance(self.value, str | Path)
        name = Path(self.value).name if is_path else None
        if name is None:
            name = self.value if isinstance(self.value, str) else "data in memory"
        return f"{self.kind}: {name}"


def locate(spec: DataSpec, given: Any = None, *, recipe: str) -> Source:
    """Decide where the data of `spec` is read from.

    The order is: what the caller gives, the built-in set, the path that stands in the place of a hub id, the hub (only
    when the set is in its cache already, or the hub answers at once), the copy below `$EVERLORA_SHARED/data`
    (`../shared/data` when the variable is not set). Like every path, that of a recipe is relative to the folder that
    everlora is started in.

    Args:
        spec: the recipe's description of its data.
        given: a folder or file, or data in memory; wins over everything else.
        recipe: the recipe's name, for the message.

    Returns:
        The first of these that is there.

    Raises:
        DataError: none of them is.
    """
    if given is not None:
        if isinstance(given, str | Path) and not Path(given).exists() and ":" not in str(given):
            raise DataError(f"{given}: there is no such file or folder; give --data the data set's folder.")
        return Source(given, _fitting_columns(given, (spec.columns, spec.shared_columns)), "given")
    if spec.builtin is not None:
        return Source(spec.builtin, None, "builtin")
    if spec.hub is not None and Path(spec.hub).exists():
        # Columns that the recipe names and the files lack are told of where the files are read.
        columns = _fitting_columns(spec.hub, (spec.columns, spec.shared_columns)) or _named(spec.columns)
        return Source(Path(spec.hub), columns, "local")
    if spec.hub is not None and (hub_copy_is_here(spec.hub) or hub_is_reachable()):
        return Source(spec.hub, _named(spec.columns), "hub")
    folder = shared_folder() / "data" / spec.shared if spec.shared is not None else None
    if folder is not None and folder.exists():
        return Source(folder, _named(spec.shared_columns), "shared")
    tried = [f"the hub (data set {spec.hub}) does not answer"] if spec.hub is not None else []
    if spec.shared is not None:
        tried.append(f"${SHARED_VARIABLE} has no data/{spec.shared}")
    raise DataError(
        f"The data of recipe '{recipe}' cannot be found: {' and '.join(tried)}; give its folder with --data."
    )


def given_part(given: Any, name: str | None, recipe: str) -> Any:
    """Return what replaces one data set of several.

    Args:
        given: None, a mapping by the data sets' names, or a folder with a folder or file for each.
        name: of the data set.
        recipe: name of the recipe, for the message.

    Raises:
        OptionError: it is neither.
        DataError: the data set is not among it.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        if name not in given:
            raise DataError(f"the data given for recipe '{recipe}' lacks '{name}'; it has {', '.join(map(str, given))}")
        return given[name]
    if isinstance(given, str | Path) and Path(given).is_dir():
        found = [path for path in sorted(Path(given).iterdir()) if name in (path.name, path.stem)]
        if found:
            return found[0]
        raise DataError(f"{given} has no folder or file '{name}', a data set of recipe '{recipe}'; add it.")
    raise OptionError(
        f"Recipe '{recipe}' reads several data sets, and --data replaces one only; give a folder that holds a folder "
        f"or file for each, such as '{name}'."
    )


def _named(columns: ColumnNames | None) -> dict[str, str] | None:
    return columns.named if columns is not None else None


def _fitting_columns(given: Any, candidates: Sequence[ColumnNames | None]) -> dict[str, str] | None:
    """Column names are known for the hub's layout and for the local one; take those that the given files have."""
    if not isinstance(given, str | Path):
        return None
    present = _column_names(Path(given))
    names = [columns.named for columns in candidates if columns is not None]
    return next((one for one in names if one and present.issuperset(_used(one.values(), present))), None)


def _used(values: Iterable[str], present: set[str]) -> set[str]:
    """The columns that names and format strings speak of."""
    columns: set[str] = set()
    for value in values:
        found = {name for _, name, _, _ in Formatter().parse(value) if name} if value not in present else set()
        columns |= found or {value}
    return columns


def _column_names(path: Path) -> set[str]:
    """Column names of the first table file at `path`; empty for anything else (images, say)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".parquet":
            return set(parquet.read_schema(file).names)
        if file.suffix in (".csv", ".tsv"):
            with file.open(newline="", encoding="utf-8", errors="replace") as lines:
                rows = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
                return set(next((row for row in rows if row), []))
    return set()
