"""The site: it builds strictly, and reading it fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# What a browser fetches by itself; links that somebody has to click are no matter.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'> ]+)|<link\b[^>]*\bhref=[\"']?([^\"'> ]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    fetched = {found for page in pages for pair in FETCHED.findall(page.read_text("utf-8")) for found in pair if found}
    assert fetched, "the pattern finds style sheets at least"
    assert not [address for address in fetched if re.match(r"(https?:)?//", address)]
    styles = "".join(sheet.read_text("utf-8") for sheet in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)", styles)


def test_pages_hold_what_is_made_at_build_time(site: Path) -> None:
    page = (site / "methods" / "inflora.html").read_text("utf-8")
    assert "<math" in page and "threshold_start" in page and "$$" not in page
    assert "<!-- options of" not in page
    reference = (site / "reference" / "learner.html").read_text("utf-8")
    for name in ("create", "learn", "predict", "evaluate", "export", "rollback", "forget", "TaskResult"):
        assert f"{name}</span>" in reference or f">{name}<" in reference, name
    assert "Unreleased" in (site / "changelog.html").read_text("utf-8")
