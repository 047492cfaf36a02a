"""No figure of the method pages is missing from the ledger: the pages are searched for whatever looks like one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from ledger_records import all_figures, read_systems

SYSTEMS = read_systems()
ALL = tuple(SYSTEMS)
PAGES = {
    "inflora.md": ("inflora", "lgq-coding"),
    "sd-lora.md": ("sd-lora",),
    "convlora-and-senacnn.md": ("convlora",),
    "i-lora.md": ("i-lora",),
    "metrics-and-protocols.md": ALL,
}
# Parts of the pages that hold published figures: there every decimal number, percentage and long count is recorded.
PARTS = {
    "inflora.md": [r"^## 19\..*?(?=^## )"],
    "sd-lora.md": [r"^Empirical claims.*?(?=^## )", r"^## 9\..*?(?=^## )"],
    "convlora-and-senacnn.md": [r"^## 1\..*?(?=^## )", r"^\| id \| claim \|.*?(?=^## )"],
    "i-lora.md": [r"^## 11\..*?(?=^## )"],
    "metrics-and-protocols.md": [
        r"^How much the weighting matters.*?(?=^## )",
        r"^Published reference points.*?(?=^## )",
        r"^\| SD-LoRA `trainer\.py` \| group labels.*?$",
    ],
}
NO_FIGURES = {
    "inflora.md": {
        "90.5": "end of the band that would count as reproduced",
        "0.6": "how far paper and logs lie apart, both of which are recorded",
    },
    "convlora-and-senacnn.md": {
        "100": "the network itself, of which the others are shares",
        ".02": "a margin of ours",
        ".020": "difference of two figures that are recorded",
        ".05": "a margin of ours",
    },
    "i-lora.md": {
        ".25": "a setting of public code",
        "1.0": "a setting of public code",
        "1,024": "tokens of a prompt",
        "5,000": "training rows",
        "2,000": "test rows",
    },
}
# Elsewhere numbers that look like accuracies must be recorded, too, but for those of parts that are about other things.
OTHER_PARTS = {
    "inflora.md": {"16. Resume state": "megabytes", "17. Cost": "operations of a pass"},
    "sd-lora.md": {"5. Three equivalent forward forms, cost and memory": "operations and megabytes"},
    "convlora-and-senacnn.md": {
        "3.3 Rank cap": "a share of a layer, counted here",
        "9. Parameter growth (exact integers, tests compare equality)": "counts of ours, which tests compare",
        "10. Cost": "operations, counted here",
    },
    "i-lora.md": {"6. Order of operations and cost": "megabytes"},
    "metrics-and-protocols.md": {
        "5. Worked example (golden numbers for tests)": "invented counts",
        "6. `as X prints it` modes": "of the invented counts",
        "16. Invariants a test can check": "of the invented counts",
    },
}
IDENTIFIER = re.compile(r"\d{4}\.\d{5}|10\.\d{4,}/\S+|\d+\.\d+\.\d+")
NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+(?= ?%))(?!\w)")
LIKE_AN_ACCURACY = re.compile(r"(?<![\w.,])\d{2}\.\d{1,4}(?![\w.])")


def _recorded(names: tuple[str, ...]) -> set[Decimal]:
    figures = [figure for name in names for figure in all_figures(SYSTEMS[name])]
    values = [value for figure in figures for value in [*figure.values.values(), *figure.sd.values()]]
    return {Decimal(str(one)) for value in values for one in (value if isinstance(value, tuple) else (value,))}


def _is_in(number: str, recorded: set[Decimal]) -> bool:
    """As printed, or as percent of a fraction."""
    value = Decimal(number.replace(",", ""))
    return value in recorded or 100 * value in recorded


@pytest.fixture(scope="module")
def pages(shared: Path) -> dict[str, str]:
    texts = {name: IDENTIFIER.sub("", (shared / "methods" / name).read_text(encoding="utf-8")) for name in PAGES}
    assert {path.name for path in (shared / "methods").glob("*.md")} == set(PAGES)
    return texts


def _parts(pages: dict[str, str], name: str) -> list[str]:
    found = [re.search(part, pages[name], flags=re.MULTILINE | re.DOTALL) for part in PARTS[name]]
    assert all(found), f"{name} has other headings now"
    return [match[0] for match in found if match]


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_the_published_parts_is_recorded(pages: dict[str, str], name: str) -> None:
    recorded, excepted = _recorded(PAGES[name]), NO_FIGURES.get(name, {})
    numbers = {number for part in _parts(pages, name) for number in NUMBER.findall(part)}
    assert len(numbers) > 5
    missing = {number for number in numbers if not _is_in(number, recorded)}
    assert missing == set(excepted), "record what is missing in docs/published/, or say why it is no figure"


@pytest.mark.parametrize("name", PAGES)
def test_numbers_like_accuracies_elsewhere_are_recorded(pages: dict[str, str], name: str) -> None:
    recorded, text = _recorded(PAGES[name]), pages[name]
    for part in _parts(pages, name):
        text = text.replace(part, "")
    missing: dict[str, set[str]] = {}
    for heading, body in _sections(text):
        if numbers := {one for one in LIKE_AN_ACCURACY.findall(body) if not _is_in(one, recorded)}:
            missing[heading] = numbers
    assert set(missing) == set(OTHER_PARTS[name]), missing


def _sections(text: str) -> Iterator[tuple[str, str]]:
    pieces = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    yield from zip(pieces[1::2], pieces[2::2], strict=True)


def test_last_and_average_are_recorded_together(pages: dict[str, str]) -> None:
    pairs = {
        (Decimal(str(figure.values["last"])), Decimal(str(figure.values["avg"])))
        for system in SYSTEMS.values()
        for figure in all_figures(system)
        if isinstance(figure.values.get("last"), float) and isinstance(figure.values.get("avg"), float)
    }
    accuracy = r"(\d\d\.\d\d)(?: \([\d.]+\))?"
    of_sd_lora = re.findall(rf"{accuracy} / {accuracy}", _parts(pages, "sd-lora.md")[1])
    logs = re.findall(r"^\| `\S+\.log` \|[^|]+\| (\d\d\.\d\d) \| (\d\d\.\d\d) \|", pages["sd-lora.md"], re.MULTILINE)
    of_inflora = []
    for line in re.findall(
        r"^\| .* \| (\d\d\.[^|]+) \| (\d\d\.[^|]+) \|$", _parts(pages, "inflora.md")[0], re.MULTILINE
    ):
        of_inflora += zip(*(re.findall(r"(?<![\d-])\d\d\.\d\d", cell.split("(")[0]) for cell in line), strict=True)
    assert (len(of_sd_lora), len(logs), len(of_inflora)) == (34, 5, 10)
    for last, average in [*of_sd_lora, *logs, *of_inflora]:
        assert (Decimal(last), Decimal(average)) in pairs, (last, average)
