"""What the tests of durability share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.toy import tiny_model


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of texts."""
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of images."""
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture
def seed() -> int:
    """Of random moments: another one at each run; the variable repeats one."""
    return int(os.environ.get("EVERLORA_KILL_SEED", time.time_ns() % 10**6))
