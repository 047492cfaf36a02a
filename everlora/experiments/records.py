"""The record of one row and seed, `run.json`: all that was measured, written whole after each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlora.errors import OptionError, StoreError
from everlora.store.files import MAX_JSON_BYTES, dump_json, is_temporary, load_json, read_bytes, replace_file

__all__ = ["COUNTS", "RunRecord", "is_fresh", "read_json", "write_json"]

COUNTS = ("correct", "task_aware", "task_correct")

FORMAT = 1


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Give `path` these plain values in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, dump_json(values, path.name))


def is_fresh(folder: Path, name: str) -> bool:
    """Whether nothing is in a folder, or only what a process left that was killed while it wrote the file `name`."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(is_temporary(entry.name, name) for entry in folder.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        StoreError: the file is missing or damaged.
    """
    return load_json(read_bytes(path, limit=MAX_JSON_BYTES), path)


@dataclass
class RunRecord:
    """What is known so far about one row with one seed.

    Attributes:
        path: the file.
        values: its content; `rows_done` tasks have been learned and measured.
    """

    path: Path
    values: dict[str, Any]

    @classmethod
    def open(
        cls, path: Path, *, identity: str, header: Mapping[str, Any], num_tasks: int, empty: Mapping[str, Any]
    ) -> RunRecord:
        """Read the record at `path`, or begin one.

        Args:
            path: the file; it appears with the first row.
            identity: hash of everything that decides the numbers.
            header: plain values that describe the run (method, label, seed, options, ...).
            num_tasks: tasks of the stream.
            empty: what a record without any measurement holds.

        Raises:
            OptionError: the file belongs to a run with other options or data.
            StoreError: the file is damaged.
        """
        if path.exists():
            values = read_json(path)
            if values.get("format") != FORMAT or values.get("identity") != identity:
                raise OptionError(
                    f"{path} holds results of other options, data or model; choose another folder with --out, "
                    "or give the same settings as before."
                )
            return cls(path, values)
        values = {"format": FORMAT, "identity": identity, "num_tasks": num_tasks, "rows_done": 0}
        return cls(path, {**values, **header, **empty, "cost": [], "panels": {}})

    def lacks_path(self, first: int, points: int) -> bool:
        """Whether accuracy along the path from task `first` to the next was not measured with so many points."""
        known = self.values.get("paths", [])
        return not any(entry["first"] == first and entry["points"] == points for entry in known)

    def keep_path(self, entry: Mapping[str, Any]) -> None:
        """Put in what was measured along one path, in the place of what was known of it, and write the file."""
        others = [known for known in self.values.get("paths", []) if known["first"] != entry["first"]]
        self.values["paths"] = sorted([*others, dict(entry)], key=lambda known: int(known["first"]))
        self.save()

    @property
    def rows_done(self) -> int:
        """Tasks that are learned and measured."""
        return int(self.values["rows_done"])

    @property
    def is_complete(self) -> bool:
        """Whether all tasks are."""
        return self.rows_done == int(self.values["num_tasks"])

    def save(self) -> None:
        """Write the file as it is now."""
        write_json(self.path, self.values)

    def put_counts(self, counts: Sequence[Mapping[str, int]], task: int) -> None:
        """Put in the row of `task`, without writing it.

        Args:
            counts: for each task `j <= task`: `correct`, `size`, `task_aware` and `task_correct`.
            task: index of the row.

        Raises:
            StoreError: a test set has another size than before.
        """
        sizes = self.values["sizes"]
        for j, cell in enumerate(counts):
            if sizes[j] not in (None, cell["size"]):
                raise StoreError(
                    f"{self.path}: the test set of task {j} had {sizes[j]} examples before and has {cell['size']} now; "
                    "the data has changed, so choose another folder with --out."
                )
            sizes[j] = cell["size"]
            for name in COUNTS:
                self.values[name][task][j] = cell[name]

    def append(self, *, cost: Mapping[str, Any], panels: Mapping[str, Mapping[str, float]], task: int) -> None:
        """Add what is known of `task`, the newest one, once it is measured, and write the file.

        Args:
            cost: seconds, steps, bytes and parameters of the task.
            panels: the method's own figures after the task.
            task: index of the task; rows skipped in between stay unmeasured.
        """
        self.values["cost"].append(dict(cost))
        _add_panels(self.values["panels"], panels, task)
        self.values["rows_done"] = task + 1
        self.save()


def _add_panels(known: dict[str, Any], panels: Mapping[str, Mapping[str, float]], task: int) -> None:
    """Lengthen each curve to `task + 1` values; a figure that was not given for a task is `None` there."""
    for panel, figures in panels.items():
        curves = known.setdefault(panel, {})
        for name, value in figures.items():
            curve = curves.setdefault(name, [])
            curve += [None] * (task - len(curve)) + [value]
