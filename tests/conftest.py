"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _shared_folder() -> Path:
    return Path(os.environ.get("EVERLORA_SHARED", REPOSITORY.parent / "shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models; the test is skipped where it is absent."""
    folder = _shared_folder()
    if not (folder / "data").is_dir():
        pytest.skip(f"shared data not found at {folder}; set EVERLORA_SHARED")
    return folder
