"""What the tests of the store share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests look at which steps are made and in which order; that fsync itself works is the system's affair."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
