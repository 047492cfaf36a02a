"""The continual-learning methods: one file each, found by its `@register` line.

Listing the methods reads their source without importing it, so help and `everlora methods` need no torch;
`method_spec` imports the one that is asked for.
"""

from everlora.methods.catalogue import DEFAULT, MethodEntry, list_methods, method_entry
from everlora.methods.registry import MethodSpec, method_spec

__all__ = ["DEFAULT", "MethodEntry", "MethodSpec", "list_methods", "method_entry", "method_spec"]
