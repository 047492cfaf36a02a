"""What is tried: values and ranges of options, and the settings that a grid or a draw makes of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everlora.errors import OptionError

__all__ = ["Range", "Space", "drawn_settings", "grid_settings", "read_space"]

_TO = ".."
_MOST = 10_000
_EDGE = 0.1


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, to draw from.

    Attributes:
        low: the smallest.
        high: the largest.
        is_log: whether equal ratios, rather than equal differences, are equally likely.
        is_whole: whether only whole numbers are drawn.
    """

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def draw(self, random: np.random.RandomState) -> float | int:
        """Draw one number, rounded to three digits so that what is printed is what was tried."""
        if self.is_whole:
            return int(random.randint(int(self.low), int(self.high) + 1))
        if self.is_log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random.uniform(self.low, self.high)
        return min(max(float(f"{value:.3g}"), self.low), self.high)

    def edge(self, value: float) -> str | None:
        """`smallest` or `largest` when a value lies in the outer tenth of the range."""
        low, high, place = self.low, self.high, float(value)
        if self.is_log:
            low, high, place = math.log(low), math.log(high), math.log(place)
        share = (place - low) / (high - low)
        return "smallest" if share <= _EDGE else "largest" if share >= 1 - _EDGE else None

    def __str__(self) -> str:
        sign = "int:" if self.is_whole else "log:" if self.is_log else ""
        return f"{sign}{self.low:g}{_TO}{self.high:g}"


Space = dict[str, "tuple[Any, ...] | Range"]


def read_space(given: Mapping[str, Any]) -> Space:
    """Read values and ranges.

    Args:
        given: option to values: a sequence, or a text such as `"1e-3,3e-3"`, or a range `"0..0.5"`, `"log:1e-4..1e-1"`
            or `"int:2..16"`.

    Raises:
        OptionError: nothing is given, a range is not one, or an option has no value or one twice.
    """
    if not given:
        raise OptionError(
            "a sweep needs something to try; give at least one option with its values, as in lr=1e-3,1e-2"
        )
    return {key.strip().replace("-", "_"): _read_one(key, value) for key, value in given.items()}


def grid_settings(space: Space) -> list[dict[str, Any]]:
    """Every combination of the values, the last option changing fastest.

    Raises:
        OptionError: an option has a range, or there are too many combinations.
    """
    for key, values in space.items():
        if isinstance(values, Range):
            raise OptionError(f"'{key}' has the range {values}, which a grid cannot list; draw from it with --random N")
    columns = {key: values for key, values in space.items() if not isinstance(values, Range)}
    if (count := math.prod(len(values) for values in columns.values())) > _MOST:
        raise OptionError(f"the grid has {count} settings, more than {_MOST}; draw some of them with --random N")
    return [dict(zip(columns, chosen, strict=True)) for chosen in itertools.product(*columns.values())]


def drawn_settings(space: Space, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw settings at random; more of them with the same seed begin with the same ones.

    Args:
        space: what to draw from; listed values are equally likely.
        count: how many, at least 1.
        seed: of the draw.

    Raises:
        OptionError: `count` is out of range.
    """
    if not 1 <= count <= _MOST:
        raise OptionError(f"a random sweep draws 1 to {_MOST} settings, found {count}; choose another number")
    random = np.random.RandomState(seed)
    return [{key: _drawn(values, random) for key, values in space.items()} for _ in range(count)]


def _drawn(values: tuple[Any, ...] | Range, random: np.random.RandomState) -> Any:
    return values.draw(random) if isinstance(values, Range) else values[random.randint(len(values))]


def _read_one(key: str, given: Any) -> tuple[Any, ...] | Range:
    if isinstance(given, Range):
        return given
    if isinstance(given, str):
        if _TO in given and "," not in given:
            return _read_range(key, given)
        values: tuple[Any, ...] = tuple(_value(word) for word in _split(given))
    else:
        values = tuple(given) if isinstance(given, Sequence) else (given,)
    if not values or any(value == "" for value in values):
        raise OptionError(f"'{key}' is given an empty value; write its values as in {key}=1,2")
    if len({json.dumps(value) for value in values}) < len(values):
        raise OptionError(f"'{key}' is given one value twice; leave one out")
    return values


def _read_range(key: str, text: str) -> Range:
    sign, separator, ends = text.rpartition(":")
    low, _, high = ends.partition(_TO)
    try:
        found = Range(float(low), float(high), is_log=sign == "log", is_whole=sign == "int")
    except ValueError as error:
        raise OptionError(
            f"'{key}' has no range in '{text}'; write it as in 0..1, log:1e-4..1e-1 or int:2..16"
        ) from error
    wrong = [
        (separator and sign not in ("log", "int"), f"begins with '{sign}'; known: int, log"),
        (not (math.isfinite(found.low) and math.isfinite(found.high)), "must end at finite numbers; give others"),
        (found.low >= found.high, "must go from a smaller number to a larger one; turn it around"),
        (found.is_log and found.low <= 0, "is logarithmic and must lie above 0; choose another end"),
        (found.is_whole and (found.low % 1 or found.high % 1), "must go from one whole number to another"),
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise OptionError(f"the range '{text}' of '{key}' {words}")
    return found


def _split(text: str) -> list[str]:
    """Split at commas that stand outside of brackets and quotes."""
    words, depth, quoted, start = [], 0, False, 0
    for place, sign in enumerate(text):
        quoted ^= sign == '"'
        depth += 0 if quoted else (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quoted:
            words.append(text[start:place].strip())
            start = place + 1
    return [*words, text[start:].strip()]


def _refuse_constant(word: str) -> Any:
    raise ValueError(word)


def _value(word: str) -> Any:
    """Read JSON where the word is JSON, else keep the word, as `--set` does."""
    try:
        return json.loads(word, parse_constant=_refuse_constant)
    except ValueError:
        return word
