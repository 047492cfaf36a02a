"""A hundred tasks of real data by every method: does it finish, does the cost stay flat, does `status` stay readable.

    python benchmarks/long_streams.py --out benchmarks/results/long-streams.json
    python benchmarks/long_streams.py --streams clinc,cifar --methods inflora,replay --tasks 100 --out FILE
    python benchmarks/long_streams.py --page          # write docs/long-streams.md from the file

Rows that the file has already are left alone; each finished row is written at once. A row is learned in a process of
its own, by the calls a user makes: passes over the data, training, consolidation and writing are all in the seconds,
measuring on test rows is not. A task's cost is given in seconds of the processor, which other work on the machine does
not move, and in wall seconds, which has the waiting for the disk in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from long_stream_data import STREAMS, LongStream, shared_folder, together
from long_stream_page import PAGE, page
from long_stream_rows import Row, rows_of
from processor import processor
from typer.testing import CliRunner

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.cli.application import app
from everlora.errors import EverloraError
from everlora.status import read_status
from everlora.store import LearnerStore
from everlora.streams import concatenate

RESULTS = Path(__file__).parent / "results" / "long-streams.json"
LOOKS = 5  # times at which the test rows of everything seen are measured
OPENINGS = 3
PACKAGES = ("everlora", "torch", "transformers", "peft", "numpy")


@dataclass
class Spent:
    """What one task cost."""

    busy: float
    wall: float
    peak_bytes: int
    disk_bytes: int
    state_bytes: int


def bytes_below(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def learn_task(learner: Learner, rows: Any, name: str) -> Spent:
    """Learn one task, and look at what it cost and left on disk."""
    wall, busy = time.perf_counter(), time.process_time()
    learner.learn(rows, name=name)
    busy, wall = time.process_time() - busy, time.perf_counter() - wall
    entry = learner.tasks[-1]
    cost = LearnerStore.open(learner.path).read_task(entry.index).record["cost"]
    newest = learner.path / "state" / f"{entry.index:03d}"
    return Spent(busy, wall, cost["peak_memory_bytes"], bytes_below(learner.path / entry.folder), bytes_below(newest))


def figure(learner: Learner, stream: LongStream, count: int) -> float:
    """Accuracy on the test rows of everything seen in so many tasks; nats a token of a language model."""
    seen = stream.seen(count)
    if stream.scenario in ("class_incremental", "domain_incremental"):
        return learner.evaluate(together(seen)).accuracy or 0.0
    scores = learner.evaluate_tasks(seen)
    above, below = ("nll", "tokens") if stream.scenario == "language" else ("correct", "size")
    return float(sum(getattr(score, above) for score in scores) / sum(getattr(score, below) for score in scores))


def learn(stream: LongStream, row: Row, folder: Path) -> dict[str, Any]:
    """Learn all tasks of a stream by one method; return all that was measured, per task."""
    options = {**stream.options, **row.options}
    learner = Learner.create(
        folder, model=stream.model, method=row.method, scenario=stream.scenario, device="cpu", **options
    )
    if learner.trains_on == "stream":
        spent = [learn_task(learner, concatenate(stream.tasks), "all")]
        looked = {len(stream.tasks): figure(learner, stream, len(stream.tasks))}
        return {"tasks": [vars(one) for one in spent], "figures": looked}
    spent, looked, number = [], {}, len(stream.tasks)
    places = {max(1, number * look // LOOKS) for look in range(1, LOOKS + 1)}
    for index, rows in enumerate(stream.tasks):
        spent.append(learn_task(learner, rows, f"task-{index + 1:03d}"))
        if index + 1 in places:
            looked[index + 1] = figure(learner, stream, index + 1)
    return {"tasks": [vars(one) for one in spent], "figures": looked}


def opening(folder: Path) -> dict[str, Any]:
    """Median seconds of opening a learner."""
    seconds = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        Learner.open(folder, device="cpu")
        seconds.append(time.perf_counter() - start)
    return {"open_seconds": statistics.median(seconds)}


def shown(folder: Path) -> dict[str, Any]:
    """How much `everlora status` says, in lines at two widths of a terminal, and as JSON in bytes."""
    start = time.process_time()
    read_status(folder)
    found: dict[str, Any] = {"status_seconds": round(time.process_time() - start, 3)}
    for width in (80, 120):
        printed = CliRunner().invoke(app, ["status", str(folder)], env={"COLUMNS": str(width)}).output
        found[f"status_lines_{width}"] = len(printed.splitlines())
    everything = CliRunner().invoke(app, ["status", str(folder), "--all"], env={"COLUMNS": "120"}).output
    document = CliRunner().invoke(app, ["status", str(folder), "--json"]).output
    return {**found, "status_all_lines": len(everything.splitlines()), "status_json_bytes": len(document.encode())}


def in_a_fork(function: Any, *arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own that has everything imported; a refusal or failure is a result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send(function(*arguments))
        except EverloraError as error:
            sender.send({"refused": str(error)})
        except Exception as error:
            sender.send({"failed": f"{type(error).__name__}: {error}"})

    process = context.Process(target=call)
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        found = {"failed": "the process ended without a word"}
    process.join()
    return found


def windows(values: Sequence[float]) -> list[float]:
    """Medians of ten tasks after the first, of ten in the middle, and of the last ten."""
    part, middle = max(1, min(10, len(values) // 3)), len(values) // 2
    pieces = values[1 : 1 + part] or values, values[max(0, middle - part // 2) :][:part], values[-part:]
    return [statistics.median(piece) for piece in pieces]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What the file keeps of a row: windows of each cost, and the figures."""
    if "tasks" not in found:
        return found
    kept: dict[str, Any] = {"num_tasks": len(found["tasks"])}
    for key, digits in (("busy", 4), ("wall", 4), ("peak_bytes", 0), ("disk_bytes", 0), ("state_bytes", 0)):
        ends = windows([task[key] for task in found["tasks"]])
        kept[key] = [round(value, digits) if digits else int(value) for value in ends]
    kept["disk_bytes_in_all"] = sum(task["disk_bytes"] for task in found["tasks"])
    kept["busy_in_all"] = round(sum(task["busy"] for task in found["tasks"]), 2)
    figures = {str(count): round(value, 4) for count, value in found["figures"].items()}
    kept |= {"figures": figures, "last": list(figures.values())[-1], "avg": round(statistics.mean(figures.values()), 4)}
    return kept


def measure(stream: LongStream, row: Row, folder: Path) -> dict[str, Any]:
    """Everything about one row, for the file."""
    start = time.perf_counter()
    result = summary(in_a_fork(learn, stream, row, folder))
    if "num_tasks" in result:
        result |= in_a_fork(opening, folder)
        result |= in_a_fork(shown, folder)
    options = {name: _plain(value) for name, value in row.options.items()}
    return {
        "stream": stream.name,
        "row": row.label,
        "method": row.method,
        "options": options,
        **result,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds_in_all": round(time.perf_counter() - start, 1),
    }


def _plain(value: Any) -> Any:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "device": f"CPU, {torch.get_num_threads()} thread",
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def load(path: Path) -> dict[str, Any]:
    """The file's content, or that of a new one."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"rows": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def run(streams: Sequence[str], methods: Sequence[str], tasks: int, path: Path, *, place: Path) -> dict[str, Any]:
    """Measure all rows that the file lacks.

    Args:
        streams: names of streams.
        methods: names of methods or rows; all where there is none.
        tasks: how many of each stream.
        path: of the file.
        place: a folder for learners.
    """
    results = load(path)
    if results.get("tasks", tasks) != tasks:
        raise SystemExit(f"{path} was measured with --tasks {results['tasks']}; give that number or another file")
    for name in streams:
        wanted = [row for row in rows_of(name) if not methods or row.method in methods or row.label in methods]
        done = {(row["stream"], row["row"]) for row in results["rows"]}
        wanted = [row for row in wanted if (name, row.label) not in done]
        if not wanted:
            continue
        stream = STREAMS[name](tasks)
        # once here, and not in the fork of every row, which finds imported what a model needs
        load_backbone(stream.model, kind="causal_lm" if stream.scenario == "language" else "encoder")
        about = {"title": stream.title, "about": stream.about, "options": stream.options, "scenario": stream.scenario}
        for row in wanted:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                found = measure(stream, row, Path(folder) / "learner")
            results = load(path)  # somebody may have measured other rows meanwhile
            results |= {"command": "python benchmarks/long_streams.py", "tasks": tasks, **machine()}
            results.setdefault("streams", {})[name] = about
            results["rows"].append(found)
            save(path, results)
            told = found.get("refused") or found.get("failed") or f"{found.get('busy')} s, last {found.get('last')}"
            print(f"{name:<10}{row.label:<34}{found['seconds_in_all']:>7.1f} s  {told}", flush=True)
    return results


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", default=",".join(STREAMS), help=f"of {', '.join(STREAMS)} (all)")
    parser.add_argument("--methods", default="", help="names of methods or rows (all)")
    parser.add_argument("--tasks", type=int, default=100, help="of each stream (100)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--page", action="store_true", help="write the page from the file, and measure nothing")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, or write the page."""
    options = arguments()
    if options.page:
        PAGE.write_text(page(load(options.out)), encoding="utf-8")
        return
    if not shared_folder().is_dir():
        sys.exit(f"no data in {shared_folder()}; set EVERLORA_SHARED")
    torch.set_num_threads(1)
    logging.getLogger("everlora").setLevel(logging.ERROR)  # texts that are cut, a hundred times
    streams, methods = options.streams.split(","), [name for name in options.methods.split(",") if name]
    with tempfile.TemporaryDirectory() as place:
        run(streams, methods, options.tasks, options.out, place=Path(place))


if __name__ == "__main__":
    main()
