"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _shared_folder() -> Path:
    return Path(os.environ.get("EVERLORA_SHARED", REPOSITORY.parent / "shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models; without it a test is skipped, and fails where CI is set."""
    folder = _shared_folder()
    if not (folder / "data").is_dir():
        reason = f"shared data not found at {folder}; set EVERLORA_SHARED"
        # A continuous integration that skips its main measurements would pass for the wrong reason.
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests look at which steps are made and in which order; that fsync itself works is the system's affair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield
