"""Recipes, and the runs made from them. Reading recipes needs no torch; `run` brings it when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everlora.experiments.recipe import Recipe, RecipeInfo, list_recipes, load_recipe, recipe_text

if TYPE_CHECKING:
    from everlora.experiments.runner import run

__all__ = ["Recipe", "RecipeInfo", "list_recipes", "load_recipe", "recipe_text", "run"]


def __getattr__(name: str) -> Any:
    """Import `run` on first use."""
    if name == "run":
        from everlora.experiments.runner import run

        return run
    raise AttributeError(f"module 'everlora.experiments' has no attribute '{name}'")
