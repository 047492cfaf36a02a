"""The model the tests of callbacks run on, and a garbage collector that leaves imported libraries alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def light_collections() -> Iterator[None]:
    """Each training of a Trainer begins with a full collection, most of it over what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["random", pytest.param("stories260K", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest) -> Path | None:
    """Where the base model comes from: None for one of the same shape with random weights."""
    if request.param == "random":
        return None
    shared: Path = request.getfixturevalue("shared")
    return shared
