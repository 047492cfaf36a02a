"""What all parts of a recipe have in common, and the values that options take."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["OptionValue", "Options", "Part"]

OptionValue = bool | int | float | str | list[bool | int | float | str] | None
Options = dict[str, OptionValue]


class Part(BaseModel):
    """Base of all parts: nothing can be changed after reading, and nothing unknown is let through."""

    model_config = ConfigDict(frozen=True, extra="forbid")
