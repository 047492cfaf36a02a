"""Reading YAML strictly: floats such as `1e-3` are numbers, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode

from everlora.errors import OptionError

__all__ = ["parse_yaml"]


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, without its two traps."""


def _mapping_without_duplicates(loader: _StrictLoader, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        # An unhashable key is refused by construct_mapping below, with its line.
        key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
        if key is not None and key in seen:
            raise ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=deep)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# YAML 1.1 wants a dot in every float and would hand "1e-3" on as text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, file: str) -> dict[str, Any]:
    """Parse `text` as one YAML mapping.

    Args:
        text: the document.
        file: its name, for messages.

    Returns:
        The mapping at the top.

    Raises:
        OptionError: the text is not YAML, holds a key twice, or is not a mapping.
    """
    try:
        document = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise OptionError(f"{file}{where}: not a valid YAML file: {problem}; correct the line.") from error
    except RecursionError as error:
        raise OptionError(f"{file}: is nested too deeply to be a recipe; check its brackets.") from error
    # What PyYAML's own constructors raise on dates, numbers and tags that only look like ones.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OptionError(f"{file}: holds a value that YAML cannot read ({error}); put it into quotes.") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise OptionError(f"{file}: expected a mapping with fields such as name and data, found {found}.")
    if odd := [key for key in document if not isinstance(key, str)]:
        raise OptionError(f"{file}: expected field names, found the key {odd[0]!r}; write it as text.")
    return document
