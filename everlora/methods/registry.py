"""Registration of methods, and the reading of their options."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from everlora.errors import OptionError, nearest
from everlora.methods.catalogue import method_entry

if TYPE_CHECKING:
    from everlora.methods.base import Method

__all__ = ["MethodSpec", "method_spec", "parse_options", "register"]

MethodClass = TypeVar("MethodClass", bound="type[Method]")
OptionsClass = TypeVar("OptionsClass")
_REGISTERED: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class MethodSpec:
    """A method ready to be made: its class, and the options its registered name sets."""

    name: str
    method_class: type[Method]
    preset: Mapping[str, Any]

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of the options the method takes."""
        return tuple(field.name for field in dataclasses.fields(self.method_class.options_type))

    def options(self, values: Mapping[str, Any]) -> Any:
        """Validate `values` over the preset and return the method's options object."""
        return parse_options(self.method_class.options_type, {**self.preset, **values}, f"method '{self.name}'")


def register(
    name: str,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    aliases: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
) -> Callable[[MethodClass], MethodClass]:
    """Register a method class under `name`; its presets are the published variants, as options of the same class.

    The arguments must be literals: the catalogue reads them without importing the module.

    Args:
        name: registered name, lower_snake, as in the paper.
        presets: further registered names, each with the options it sets.
        aliases: other spellings -> the registered name or preset they stand for.
        about: one line for each preset, for listings.

    Raises:
        OptionError: the name is not lower_snake, or is taken.
    """
    for word in (name, *(presets or {}), *(aliases or {})):
        if not word.isidentifier() or word != word.lower():
            raise OptionError(f"method name '{word}' must be lower_snake, letters, digits and '_'.")

    for known, words in (("aliases", (aliases or {}).values()), ("about", about or {})):
        for word in words:
            if word not in {name, *(presets or {})}:
                raise OptionError(f"{known} of method '{name}' speak of '{word}', which is not registered here.")

    def keep(method_class: MethodClass) -> MethodClass:
        if _REGISTERED.get(name, method_class).__qualname__ != method_class.__qualname__:
            raise OptionError(f"method name '{name}' is taken by {_REGISTERED[name].__qualname__}; choose another.")
        _REGISTERED[name] = method_class
        return method_class

    return keep


def method_spec(name: str) -> MethodSpec:
    """Import and return the method registered under `name` (or an alias, or a preset's name).

    Raises:
        OptionError: no such method.
    """
    entry = method_entry(name)
    importlib.import_module(entry.module)
    base = next(key for key, cls in _REGISTERED.items() if cls.__module__ == entry.module)
    return MethodSpec(entry.name, _REGISTERED[base], entry.preset)


def parse_options(options_type: type[OptionsClass], values: Mapping[str, Any], owner: str) -> OptionsClass:
    """Validate plain values into a frozen options dataclass.

    Args:
        options_type: a dataclass with annotated fields and defaults.
        values: field name -> plain value.
        owner: what the options belong to, for the message.

    Raises:
        OptionError: an unknown name (the nearest are given), a wrong type, or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(options_type)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise OptionError(f"{owner} has no option '{key}'; {nearest(key, known)}")
    try:
        validator = _validator(options_type)  # type: ignore[arg-type]
        kinds = _kinds(options_type)  # type: ignore[arg-type]
        options: OptionsClass = validator.validate_python({k: _several(v, kinds[k]) for k, v in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "options"
        message = first["msg"].removeprefix("Value error, ")
        raise OptionError(f"option '{field}' of {owner}: {message}; got {first.get('input')!r}.") from None
    return options


@functools.cache
def _kinds(options_type: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(options_type)


def _several(value: Any, kind: Any) -> Any:
    """Where an option has several values, let one stand for itself and a text have commas: `q_proj,v_proj`."""
    kinds = (kind,) if typing.get_origin(kind) is tuple else typing.get_args(kind)
    words = [word for one in kinds if typing.get_origin(one) is Literal for word in typing.get_args(one)]
    if value in words or not any(typing.get_origin(one) is tuple for one in kinds):
        return value
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


@functools.cache
def _validator(options_type: type[Any]) -> TypeAdapter[Any]:
    """Made once for each class: that takes a hundred times as long as a validation."""
    return TypeAdapter(options_type)
