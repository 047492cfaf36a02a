"""A path that stands in a recipe in the place of a hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlora.errors import DataError
from everlora.experiments import sources
from everlora.experiments.data import read_splits
from everlora.experiments.schema import ColumnNames, DataSpec
from everlora.experiments.sources import locate

COLUMNS = ColumnNames(text="request", label="intent")


@pytest.fixture(autouse=True)
def my_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two splits, below the folder that everlora is started in; no hub may be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "hub_copy_is_here", lambda name: pytest.fail("looked for a hub's copy"))
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: pytest.fail("asked the hub"))
    folder = tmp_path / "my-data"
    folder.mkdir()
    for split in ("train", "test"):
        rows = "".join(f"{word} {number},{word}\n" for number in range(3) for word in ("open", "close"))
        (folder / f"{split}.csv").write_text(f"request,intent\n{rows}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("hub", ["my-data", "./my-data", "{folder}"])
def test_a_folder_is_read_without_the_hub(my_data: Path, hub: str) -> None:
    spec = DataSpec(hub=hub.format(folder=my_data), columns=COLUMNS)
    splits, source = read_splits(spec, recipe="mine")
    assert (len(splits["train"]), splits["test"].class_names) == (6, ("close", "open"))
    assert (source.kind, source.text, source.columns) == ("local", "local: my-data", COLUMNS.named)


def test_a_file_will_do(my_data: Path) -> None:
    spec = DataSpec(hub="my-data/train.csv", columns=COLUMNS, test_fraction=0.34)
    splits, source = read_splits(spec, recipe="mine")
    assert (len(splits["train"]), len(splits["test"]), source.text) == (4, 2, "local: train.csv")


def test_columns_that_are_not_there_are_told_of() -> None:
    spec = DataSpec(hub="my-data", columns=ColumnNames(text="request", label="intents"))
    with pytest.raises(DataError, match="intents"):
        read_splits(spec, recipe="mine")


def test_what_is_given_wins(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert locate(DataSpec(hub="my-data"), tmp_path / "other", recipe="mine").kind == "given"
