from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from everlora.cli.method_options import read_options
from everlora.errors import OptionError
from everlora.methods import list_methods, method_spec
from everlora.settings import LearnerOptions, ModelOptions
from everlora.training import TrainingOptions


def _as_plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", [entry.name for entry in list_methods()])
def test_what_is_read_from_source_is_what_the_class_says(name: str) -> None:
    entry = next(entry for entry in list_methods() if entry.name == name)
    spec = method_spec(name)
    # The declared defaults: a class may fill in the ones that are none when it is made.
    fields = dataclasses.fields(spec.method_class.options_type)
    defaults = {field.name: spec.preset.get(field.name, field.default) for field in fields}
    read = read_options(entry.module, preset=entry.preset)
    assert {option.name: _as_plain(option.default) for option in read} == {
        key: _as_plain(value) for key, value in defaults.items()
    }
    assert all(option.description for option in read), f"{name}: an option without a line of description"


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("everlora.training.options", TrainingOptions),
        ("everlora.settings", ModelOptions),
        ("everlora.settings", LearnerOptions),
    ],
)
def test_the_options_every_method_shares(module: str, options: Any) -> None:
    read = read_options(module, class_name=options.__name__)
    assert [option.name for option in read] == [field.name for field in dataclasses.fields(options)]
    assert all(option.description for option in read)


def test_types_read_like_words() -> None:
    types = {option.name: option.type for option in read_options("everlora.methods.inflora")}
    assert types["rank"] == "int >= 1"
    assert types["total_tasks"] == "int >= 1 or none"
    assert types["threshold_start"] == "float > 0 and < 1"
    assert types["loss"] == "local, seen"
    assert types["targets"] == "list of str or none"


def test_a_module_without_options_is_named() -> None:
    with pytest.raises(OptionError, match=r"everlora\.errors"):
        read_options("everlora.errors")
