"""The 5-minute start, run as it is written: every block, in order, in an empty folder, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import code_blocks

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "start.md"
RUN_BY = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def test_the_page_has_what_is_to_be_run() -> None:
    languages = [block.language for block in code_blocks(PAGE)]
    assert languages.count("bash") >= 4 and languages.count("python") >= 2
    assert set(languages) == {"bash", "python", "text"}, "a block in another language would not be run"


@pytest.mark.slow
def test_the_start_runs_as_written(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "everlora"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m everlora \"$@\"\n")
    program.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    printed = ""
    for block in code_blocks(PAGE):
        if block.language in RUN_BY:
            command = [*RUN_BY[block.language], block.code]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block.code}\n{done.stderr}"
            printed += done.stdout
    for shown in ("digit 0", "digit 5", "january", "february"):
        assert shown in printed
    assert {"numbers", "means", "served"} <= {path.name for path in folder.iterdir()}
    assert (folder / "served" / "README.md").is_file()
