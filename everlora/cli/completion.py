"""What a shell offers while a command is typed: names of methods, recipes, forms of export, scenarios and trackers."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["formats", "method_list", "methods", "recipes", "scenarios", "tracker_list"]

Offers = list[tuple[str, str]]
"""Words, each with what it means."""


def methods(incomplete: str) -> Offers:
    """Names of methods."""
    from everlora.methods.catalogue import list_methods

    return _fitting(((entry.name, entry.summary) for entry in list_methods()), incomplete)


def method_list(incomplete: str) -> Offers:
    """Names of methods, after those that stand before a comma."""
    return _after_comma([*methods(""), ("all", "every row of the recipe")], incomplete)


def recipes(incomplete: str) -> Offers:
    """Names of recipes."""
    from everlora.experiments import list_recipes

    return _fitting(((entry.name, entry.title) for entry in list_recipes()), incomplete)


def formats(incomplete: str) -> Offers:
    """Forms of export."""
    known = (("merged", "a plain model of the base's kind"), ("peft", "an adapter folder for PEFT"))
    return _fitting(known, incomplete)


def scenarios(incomplete: str) -> Offers:
    """Names of scenarios; written out, because the package that knows them brings torch."""
    known = (
        ("class_incremental", "new classes come with the tasks"),
        ("domain_incremental", "the same classes on other inputs"),
        ("task_incremental", "the task is given with each input"),
        ("language", "a causal language model"),
    )
    return _fitting(known, incomplete)


def tracker_list(incomplete: str) -> Offers:
    """Names of trackers, after those that stand before a comma."""
    from everlora.tracking import TRACKERS

    return _after_comma([(name, "") for name in TRACKERS], incomplete)


def _fitting(words: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    return [(word, help_text) for word, help_text in words if word.startswith(incomplete)]


def _after_comma(words: Iterable[tuple[str, str]], incomplete: str) -> Offers:
    before, comma, begun = incomplete.rpartition(",")
    taken = set(before.split(","))
    return [(f"{before}{comma}{word}", about) for word, about in _fitting(words, begun) if word not in taken]
