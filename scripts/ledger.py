"""Write docs/reproduction.md: others' figures and claims, each beside ours or beside the reason why there is none.

    python scripts/ledger.py            # or make ledger
    python scripts/ledger.py --check    # 1 where the page is not what the records give

Nothing on the page is typed there. Others' figures come from `published` of the recipes and from docs/published/; ours
from benchmarks/results/, which scripts/record_results.py and the benchmarks write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ledger_claims import Decision, decisions, judged_by_runs, run_link
from ledger_records import Figure, Smaller, System, Value, all_figures, read_systems, recipe
from ledger_results import Measured, Result, Row, read_results
from results_markdown import block

from everlora.comparison.measures import Measure, measure
from everlora.experiments.plan import Plan, row_options
from everlora.experiments.recipe import recipe_text
from everlora.report.table import UNDEFINED, statistic

__all__ = ["PAGE", "main", "page", "unlike_today"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduction.md"
NOT_RUN = "*not run here*"
_NOT_CHOSEN = ("seed", "total_tasks")
_VERSIONS = ("everlora", "torch", "transformers", "python")
_NAMES = {
    "last": "last",
    "last_samples": "last (sample mean)",
    "avg": "average",
    "avg_samples": "average (sample mean)",
    "learning_til": "when learned",
    "growth_per_task": "growth a task",
    "forgetting_clipped": "forgetting of its accuracies",
    "task_aware_last": "last, task given",
    "task_recognition": "task recognised",
}
INTRODUCTION = """\
# Reproduction ledger

Every figure and every claim that is known of the published systems, and what became of it here. This page is made by
`make ledger` from the recipes, the files in `docs/published/` and the result files in `benchmarks/results/`; nothing on
it is typed by hand, and a test compares it with what they give.

**How to read it.** Accuracies are percent, as printed by whoever printed them; where a source does not say which mean
it takes, nor does this page. A published figure stands beside one of ours only where recipe, setting, row, options and
model are the same. Otherwise our cell says *not run here*, and the command is the one that would run it. Runs of the
same protocol on a smaller network stand apart, under *The same protocol, a smaller network, other figures*: they say
nothing about the published figures, and what differs is written above them.

**Verdicts.** *Confirmed*: the whole 95 % bootstrap interval over at least three seeds lies on the claim's side, or the
tests named hold it. *Not confirmed*: it does not, or the source's own data or code contradict the claim. *Open*: nobody
has measured it here, or with fewer than three seeds. Three seeds make a coarse interval. A verdict holds for the
network, data and budget of the run that it names, and for no other.\
"""

HYPOTHESES = "### Hypotheses of our own, written down before the run"


def page() -> str:
    """Return the whole page."""
    systems, results = read_systems(), read_results()
    decided = {name: decisions(system, results) for name, system in systems.items()}
    parts = [INTRODUCTION, _overview(systems, decided, results)]
    for name, system in systems.items():
        parts += [f"## {system.title}", system.about, _published(system, results)]
        parts += _smaller(system, results)
        parts += ["### Claims", _claims(decided[name])]
        if system.hypotheses_of:
            parts += [HYPOTHESES, _claims(judged_by_runs(system.hypotheses_of, results))]
    used = {entry.result for system in systems.values() for entry in system.smaller if entry.result in results}
    parts += ["## Our runs", *(_run(results[name]) for name in results if name in used)]
    return "\n\n".join(parts) + "\n"


def _overview(
    systems: Mapping[str, System], decided: Mapping[str, Sequence[Decision]], results: Mapping[str, Result]
) -> str:
    rows = []
    for name, system in systems.items():
        figures = all_figures(system)
        counts = [sum(one.verdict == verdict for one in decided[name]) for verdict in _WORDS]
        known = sum(_ours(figure, results) is not None for figure in figures)
        title = f"[{system.title}](#{system.title.lower().replace(chr(39), '').replace(' ', '-')})"
        rows.append([title, str(len(figures)), str(known), *map(str, counts)])
    return _table(["System", "Entries of published figures", "of these run here", *_WORDS.values()], rows)


_WORDS = {"confirmed": "Claims confirmed", "not confirmed": "not confirmed", "open": "open"}


def _published(system: System, results: Mapping[str, Result]) -> str:
    columns = [
        "Of what",
        "Source",
        "Kind",
        "Published",
        "Recipe, setting, row",
        "Ours",
        "Command",
        "Date",
        "Device",
        "Versions",
    ]
    rows = [_line(figure, system, results) for figure in all_figures(system)]
    return f"### Published figures\n\n{_table(columns, rows)}"


def _line(figure: Figure, system: System, results: Mapping[str, Result]) -> list[str]:
    source = system.sources[figure.source]
    told = "; ".join(part for part in (figure.note, source.note) if part)
    head = [
        figure.what,
        f"{figure.source}: {told}" if told else figure.source,
        source.kind,
        "; ".join(_quantity(figure, name) for name in figure.values),
    ]
    if figure.reason:
        return [*head, UNDEFINED, f"{NOT_RUN}: {figure.reason}", *[UNDEFINED] * 4]
    where = f"`{figure.recipe}`, {figure.setting}, `{figure.row}`"
    found = _ours(figure, results)
    if found is None:
        return [*head, where, NOT_RUN, f"`{_command(figure)}`", *[UNDEFINED] * 3]
    names = [name for name in figure.values if name in _NAMES]
    row = found.rows[figure.row]
    ours = "; ".join(f"{_NAMES[name]}: {_mean(row, _measure(found, name))}" for name in names)
    return [*head, where, ours or run_link(found.name), *_measurement(found.measured)]


def _quantity(figure: Figure, name: str) -> str:
    value = figure.values[name]
    several = value if isinstance(value, tuple) else (value,)
    sd = f" ± {figure.sd[name]:.{figure.decimals}f}" if name in figure.sd else ""
    return f"{_NAMES.get(name, name)}: {', '.join(_number(one, figure.decimals) for one in several)}{sd}"


def _number(value: Value, decimals: int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.{decimals}f}"


def _command(figure: Figure) -> str:
    is_default = figure.setting == recipe(figure.recipe).default_setting
    setting = "" if is_default else f" --setting {figure.setting}"
    return f"everlora run {figure.recipe}{setting} --methods {figure.row}"


def _ours(figure: Figure, results: Mapping[str, Result]) -> Result | None:
    """The run that is the figure's recipe, setting and row, on a model of the recipe, with the options it has today."""
    for result in results.values():
        if (result.recipe, result.setting) != (figure.recipe, figure.setting) or figure.row not in result.rows:
            continue
        if result.model in recipe(figure.recipe).model and not unlike_today(result, figure.row):
            return result
    return None


def unlike_today(result: Result, row: str) -> list[str]:
    """Return the names of options that a row was run with and its recipe does not give it today, or the reverse."""
    name, run = row.partition("/")[0], result.rows[row]
    seed = int(next(iter(run.seeds)))
    given = row_options(_plan(result.recipe, result.setting), name, seed, result.num_tasks)
    today = {key: value for key, value in given.items() if key not in _NOT_CHOSEN}
    return sorted(key for key in {*today, *run.options} if today.get(key) != run.options.get(key))


@cache
def _plan(name: str, setting: str) -> Plan:
    """A plan that knows options alone: it finds no base model and reads no data."""
    return Plan(text=recipe_text(name), file=name, setting_name=setting, rows=(), seeds=(), model="")


def _measurement(measured: Sequence[Measured]) -> list[str]:
    """Cells of command, date, device and versions; what several measurements share stands once."""
    together = [
        [f"`{one.command}`" for one in measured],
        [one.date for one in measured],
        [one.device for one in measured],
        [_versions(one) for one in measured],
    ]
    return ["; ".join(dict.fromkeys(cells)) for cells in together]


def _versions(measured: Measured) -> str:
    return ", ".join(f"{name} {measured.versions[name]}" for name in _VERSIONS if name in measured.versions)


def _smaller(system: System, results: Mapping[str, Result]) -> list[str]:
    if not system.smaller:
        return []
    parts = ["### The same protocol, a smaller network, other figures"]
    for entry in system.smaller:
        result = results.get(entry.result)
        if result is None:
            parts.append(f"*Not measured yet*: `benchmarks/results` holds no {entry.result} ({entry.instead_of}).")
            continue
        parts.append(_smaller_table(entry, result))
    return parts


def _smaller_table(entry: Smaller, result: Result) -> str:
    units = [_measure(result, name) for name in entry.figures]
    # the comparison of heads is measured row by row, so one of its rows may be missing
    rows = [result.rows[name] for name in entry.rows or result.rows if name in result.rows]
    cells = [[row.label, *(_mean(row, unit) for unit in units), ", ".join(row.seeds)] for row in rows]
    more = f" All figures: [{entry.page}]({entry.page})." if entry.page else ""
    words = f"**{run_link(result.name)}** stands for: {entry.instead_of}. What differs: {entry.differs}.{more}"
    return f"{words}\n\n{_table(['Row', *(unit.heading for unit in units), 'Seeds'], cells)}"


def _measure(result: Result, name: str) -> Measure:
    return measure(name, is_language=result.is_language)


def _mean(row: Row, unit: Measure) -> str:
    found = statistic(list(row.numbers(unit.name).values()))
    if found["mean"] is None:
        return UNDEFINED
    sd = "" if found["sd"] is None else f" ± {found['sd'] * unit.scale:,.{unit.decimals}f}"
    return f"{found['mean'] * unit.scale:,.{unit.decimals}f}{sd} (n = {found['n']})"


def _claims(decided: Sequence[Decision]) -> str:
    columns = ["Claim", "Source", "Verdict", "Decided by", "Found, or why it is open", "Known of it"]
    return _table(
        columns, [[one.claim, one.source, f"**{one.verdict}**", one.by, one.found, one.published] for one in decided]
    )


def _run(result: Result) -> str:
    """A result's place: what was run, and each measurement that went into it."""
    head = f"### {result.name} {{#run-{result.name.replace('/', '-')}}}"
    of = f"Recipe `{result.recipe}`, setting `{result.setting}`, model `{result.model}`." if result.recipe else ""
    columns = ["Command", "Date", "Device", "Versions", "Recipe's text, sha256", "Commit"]
    rows = [
        [
            f"`{one.command}`",
            one.date,
            one.device,
            _versions(one),
            one.recipe_sha256[:12] or UNDEFINED,
            one.commit or "not recorded",
        ]
        for one in result.measured
    ]
    return "\n\n".join(part for part in (head, of, _table(columns, rows), _options_note(result)) if part)


def _options_note(result: Result) -> str:
    """Rows whose recorded options are not those that the recipe gives them today."""
    if not result.recipe:
        return ""
    unlike = {name: unlike_today(result, name) for name in result.rows}
    told = [f"`{name}` in {', '.join(differing)}" for name, differing in unlike.items() if differing]
    if not told:
        return "The options of all rows are those of the recipe as it is."
    return f"Options given otherwise than the recipe gives them now: {'; '.join(told)}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a caption."""
    return block("", columns, rows).partition("\n\n")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; 1 where it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page on disk differs")
    text = page()
    if not parser.parse_args(arguments).check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not what the records give; run: make ledger", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
