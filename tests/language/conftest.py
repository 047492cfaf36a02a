"""A small language model for each test that changes it, from one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlora.backbones.causal_lm import CausalLMBackbone
from tests.language.builders import load, save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def backbone(folder: Path) -> CausalLMBackbone:
    return load(folder)
