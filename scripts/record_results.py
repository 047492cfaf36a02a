"""Condense finished runs of a recipe into one small file of record.

    python scripts/record_results.py runs/cnn --out benchmarks/results/convlora-vs-senacnn-mini.json

Several folders of one recipe and setting make one file; their rows and seeds are put together. Runs of one row may not
contradict each other in an option. What is kept: every number of every row and seed, the options, the verdicts of the
run's claims, and for each folder command, date, device, versions and the recipe's text as a checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everlora.comparison.reading import RunFolder, read_runs
from everlora.comparison.runs import SeedRun, seed_runs
from everlora.errors import DataError, EverloraError
from everlora.experiments import load_recipe
from everlora.report import format_claims

__all__ = ["KIND", "condense", "main"]

KIND = "everlora run"
DIGITS = 8
_SAME = ("recipe", "setting", "model")


def condense(folders: Sequence[RunFolder], *, panels: Sequence[str] = (), commit: str | None = None) -> dict[str, Any]:
    """Return what is kept of these folders.

    Args:
        folders: of one recipe, setting and base model.
        panels: figures of methods whose values after the last task are kept too, as `magnitude`.
        commit: the version of the source that was run, where it is known.

    Raises:
        DataError: the folders are of several recipes, settings or models, hold a row and seed twice, or hold a row
            with options that contradict each other.
    """
    first = folders[0]
    for name in _SAME:
        if len(found := {getattr(folder, name) for folder in folders}) > 1:
            raise DataError(f"the folders are of one {name} each, found {', '.join(sorted(found))}; record them apart.")
    rows: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for run in seed_runs(folder):
            _add(rows, run, panels)
    settings, stream = first.results.get("settings") or {}, first.results["stream"]
    changes = {name: value for name, value in settings.items() if name not in ("setting", "minutes", "options")}
    return {
        "kind": KIND,
        "format": 1,
        "recipe": first.recipe,
        "setting": first.setting,
        "setting_says": changes,
        "model": first.model,
        "data": first.results.get("data"),
        "stream": {name: stream.get(name) for name in ("num_tasks", "scenario")},
        "orders": _orders(folders),
        "measured": [_measured(folder, commit) for folder in folders],
        "rows": {key: rows[key] for key in sorted(rows)},
        "claims": _claims(first) if len(folders) == 1 else [],
    }


def _add(rows: dict[str, dict[str, Any]], run: SeedRun, panels: Sequence[str]) -> None:
    row = rows.setdefault(run.method, {"label": run.label, "options": {}, "seeds": {}})
    where = f"row '{run.method}', seed {run.seed}"
    if str(run.seed) in row["seeds"]:
        raise DataError(f"{where}: found in two folders; give one of them.")
    for name, value in run.options.items():
        if row["options"].setdefault(name, value) != value:
            raise DataError(f"{where}: {name} is {value!r}, for other seeds {row['options'][name]!r}; record it apart.")
    entry = _entry(run)
    values = {**run.values, "path_dip": _path_dip(entry)}
    row["seeds"][str(run.seed)] = {name: _rounded(value) for name, value in sorted(values.items()) if value is not None}
    for panel in panels:
        if curve := _panel(entry, panel):
            row.setdefault("after_last_task", {}).setdefault(panel, {})[str(run.seed)] = curve


def _entry(run: SeedRun) -> Mapping[str, Any]:
    """What the run's folder holds of it; nothing for a language model, whose rows are not those of the folder."""
    entries = run.folder.results["runs"]
    return next((one for one in entries if (one["method"], one.get("seed")) == (run.method, run.seed)), {})


def _panel(entry: Mapping[str, Any], name: str) -> list[float]:
    """The values of a method's figure after the last task, one for each earlier task."""
    last = [series[-1] for series in (entry.get("panels") or {}).get(name, {}).values() if series]
    return [_rounded(value) for value in last if value is not None]


def _path_dip(entry: Mapping[str, Any]) -> float | None:
    """How far the accuracy of old tasks falls between two neighbouring models below the worse of them; mean over pairs.

    Each task's own classes compete alone, so that it is the features that are looked at.
    """
    dips = []
    for path in entry.get("paths") or []:
        places = {place["at"]: place for place in path.get("places") or []}
        old = range(path["second"])
        shares = {
            at: sum(place["task_aware"][task] / entry["sizes"][task] for task in old) / len(old)
            for at, place in places.items()
            if not isinstance(at, str) and 0 <= at <= 1
        }
        between = [share for at, share in shares.items() if 0 < at < 1]
        if between:
            dips.append(min(shares[0], shares[1]) - min(between))
    return sum(dips) / len(dips) if dips else None


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def _orders(folders: Sequence[RunFolder]) -> dict[str, str]:
    """Start of the checksum of the order of tasks, by seed."""
    streams = [item for folder in folders for item in (folder.results.get("streams") or {}).items()]
    return {seed: str(stream.get("order_hash") or "")[:12] for seed, stream in sorted(streams)}


def _measured(folder: RunFolder, commit: str | None) -> dict[str, Any]:
    results, threads = folder.results, folder.results.get("threads")
    text = str((results.get("recipe") or {}).get("text"))
    device = str(results.get("device")).replace("cpu", "CPU")
    return {
        "command": _command(folder),
        "date": str(results.get("created") or "")[:10],
        "device": f"{device}, {threads} {'thread' if threads == 1 else 'threads'} a process",
        "versions": dict(results.get("versions") or {}),
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "commit": commit,
    }


def _command(folder: RunFolder) -> str:
    """The command that makes such a run; folders of data and results are whoever runs it's own."""
    recipe, runs = load_recipe(folder.recipe), folder.results["runs"]
    parts = ["everlora run", folder.recipe]
    if folder.setting != recipe.default_setting:
        parts.append(f"--setting {folder.setting}")
    parts.append(f"--methods {','.join(dict.fromkeys(run['method'] for run in runs))}")
    parts.append(f"--seeds {','.join(str(seed) for seed in folder.results.get('seeds') or [])}")
    given: Mapping[str, Any] = (folder.results.get("settings") or {}).get("options") or {}
    parts += [f"--set {name}={json.dumps(value).strip(chr(34))}" for name, value in given.items()]
    return " ".join(parts)


def _claims(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's verdicts, each with what was found in words."""
    told = format_claims(folder.results).rows
    names = ("id", "claim", "published", "verdict", "reason")
    claims = folder.results.get("claims") or []
    return [{name: claim[name] for name in names} | {"found": row[3]} for claim, row in zip(claims, told, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; 1 where the folders cannot be put into one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that everlora run wrote")
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--panel", action="append", default=[], help="a method's figure to keep, as magnitude")
    parser.add_argument("--commit", help="version of the source that was run, where it is known")
    given = parser.parse_args(arguments)
    try:
        kept = condense(read_runs(given.folders), panels=given.panel, commit=given.commit)
    except EverloraError as error:
        print(error, file=sys.stderr)
        return 1
    given.out.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(kept['rows'])} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
