"""From older formats of the learner directory to the present one.

`learner.json` and every manifest (task.json, state.json) name the version they were written in. A new version adds one
entry to `MIGRATIONS`, which takes both kinds of file one version further. A manifest is never rewritten: it is brought
up to date in memory whenever it is read. `learner.json` is, when the directory is opened for writing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlora.errors import StoreError

__all__ = ["FIRST_VERSION", "MIGRATIONS", "Migration", "upgrade_index", "upgrade_manifest"]

FIRST_VERSION = 1

Step = Callable[[dict[str, Any]], dict[str, Any]]


def _unchanged(value: dict[str, Any]) -> dict[str, Any]:
    return value


@dataclass(frozen=True)
class Migration:
    """What one version changed.

    Attributes:
        index: takes the content of learner.json, without its checksum, to the next version.
        manifest: does the same with the content of a task.json or state.json.
    """

    index: Step = _unchanged
    manifest: Step = _unchanged


# Version -> how to get from it to the next one; there is an entry for every version but the newest.
MIGRATIONS: dict[int, Migration] = {}


def upgrade_index(value: dict[str, Any], found: int, wanted: int, path: Path) -> dict[str, Any]:
    """Take the content of `path`, a learner.json of version `found`, to version `wanted`.

    Raises:
        StoreError: there is no way from there to here.
    """
    for migration in _steps(found, wanted, path):
        value = migration.index(value)
    return value


def upgrade_manifest(value: dict[str, Any], wanted: int, path: Path) -> dict[str, Any]:
    """Take the content of `path`, a manifest, from the version it names to version `wanted`.

    Raises:
        StoreError: there is no way from there to here.
    """
    found = value.get("format_version", FIRST_VERSION)
    for migration in _steps(found, wanted, path):
        value = migration.manifest(value)
    return value


def _steps(found: object, wanted: int, path: Path) -> list[Migration]:
    if isinstance(found, bool) or not isinstance(found, int) or found < FIRST_VERSION:
        raise StoreError(f"{path} has format version {found!r}, which everlora never wrote; restore it from a backup")
    if found > wanted:
        raise StoreError(f"{path} has format version {found}, and this everlora reads up to {wanted}; upgrade everlora")
    return [MIGRATIONS[version] for version in range(found, wanted)]
