"""Blocks of code in a page, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CodeBlock", "code_blocks"]

FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    language: str
    title: str | None
    code: str


def code_blocks(page: Path) -> list[CodeBlock]:
    """Every fenced block of a page that names its language."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [CodeBlock(match["language"], match["title"], match["code"]) for match in found]
