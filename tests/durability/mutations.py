"""Made-up input: valid bytes, changed at random the way accidents and enemies change them."""

from __future__ import annotations

import random
from collections.abc import Sequence

TOKENS: dict[str, Sequence[bytes]] = {
    "csv": (b'"', b'""', b",", b"\t", b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"label", b";", b"nan"),
    "json": (
        b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"\\u0000",
        b"\\ud800", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xff", b"0.1", b'"label"', b'"text"',
    ),
    "yaml": (
        b"\n", b"  ", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"!!set ",
        b"2024-99-99", b"0b", b"0x_", b"1:99", b".inf", b"~", b"|\n", b"? ", b"'", b'"', b"[", b"{", b"]", b"}", b"\t",
        b"[" * 400, b"#", b"%YAML 9.9\n", b"---\n", b"...", b"\x00", b"!!timestamp ", b"!!float x", b"null", b"1e400",
    ),
    "binary": (b"\x00", b"\xff" * 8, b"\x7f" * 4, b"F64", b"I64", b"BF16", b"[0,0]", b"-1", b"__metadata__", b"9" * 30),
}  # fmt: skip


class Mutator:
    """Draws inputs from valid ones.

    Args:
        seeds: valid inputs.
        kind: key of `TOKENS`, pieces that the format gives a meaning to.
        seed: of the random numbers.
    """

    def __init__(self, seeds: Sequence[bytes], kind: str, seed: int) -> None:
        self.seeds = list(seeds)
        self.tokens = TOKENS[kind]
        self.random = random.Random(f"{kind} {seed}")

    def draw(self) -> bytes:
        """One more input; one in fifty is valid."""
        draw = self.random
        data = draw.choice(self.seeds)
        if draw.random() < 0.02:
            return data
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
            data = self._change(data)
        return data

    def _change(self, data: bytes) -> bytes:
        draw, size = self.random, len(data)
        start = draw.randrange(size + 1)
        end = min(size, start + draw.choice((1, 1, 2, 5, 20, 100)))
        kind = draw.randrange(8)
        if kind == 0 and size:  # one bit
            place = draw.randrange(size)
            return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
        if kind == 1:  # any bytes in the place of others
            return data[:start] + draw.randbytes(end - start) + data[end:]
        if kind == 2:  # gone
            return data[:start] + data[end:]
        if kind == 3:  # twice
            return data[:end] + data[start:end] * draw.choice((1, 1, 2, 50)) + data[end:]
        if kind == 4:  # cut short
            return data[:start]
        if kind == 5:  # the end of another input
            other = draw.choice(self.seeds)
            return data[:start] + other[draw.randrange(len(other) + 1) :]
        if kind == 6:  # over something
            return data[:start] + draw.choice(self.tokens) + data[end:]
        return data[:start] + draw.choice(self.tokens) + data[start:]

    def value(self, value: object, depth: int = 0) -> object:
        """Change a plain JSON value somewhere, keeping it plain JSON."""
        draw = self.random
        if depth > 6 or draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
            return draw.choice(
                [None, True, -1, 0, 2**63, 1.5, "", "x", "../x", "\ud800", [], {}, [[]], {"a": 1}, [1, "a"]]
            )
        if isinstance(value, list):
            place = draw.randrange(len(value))
            kind = draw.randrange(4)
            if kind == 0:
                return value[:place] + value[place + 1 :]
            if kind == 1:
                return [*value, value[place]]
            return [self.value(one, depth + 1) if index == place else one for index, one in enumerate(value)]
        key = draw.choice(list(value))
        kind = draw.randrange(5)
        if kind == 0:
            return {name: one for name, one in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(["extra", "", "text", "messages", key + "x"]): value[key]}
        return {**value, key: self.value(value[key], depth + 1)}
