"""Every command of the README and the pages is one that the program takes as it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from everlora.cli.application import USAGE_ERROR, app

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_SIGNS = {">", "|", "&&", "||", ";"}


def _commands(page: Path) -> Iterator[list[str]]:
    """The words after `everlora` of each line in the page's blocks, without what the shell makes of the output."""
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("everlora "):
                words = shlex.split(line, comments=True)[1:]
                end = next((place for place, word in enumerate(words) if word in SHELL_SIGNS), len(words))
                yield words[:end]


@pytest.mark.parametrize("page", [page for page in PAGES if any(_commands(page))], ids=lambda page: str(page.name))
def test_commands_of_the_pages_lack_no_option(page: Path) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, *words in _commands(page):
        try:
            verbs[verb].make_context(verb, list(words))
        except USAGE_ERROR as error:
            pytest.fail(f"{page.name}: everlora {verb} {shlex.join(words)}: {error.format_message()}")


def test_a_missing_option_is_found() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    with pytest.raises(USAGE_ERROR):
        verbs["sweep"].make_context("sweep", ["digits", "--methods", "probe", "--grid", "lr=1"])
    assert len(list(_commands(REPOSITORY / "README.md"))) > 15
