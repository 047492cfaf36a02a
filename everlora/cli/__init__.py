"""The command line: thin verbs over the library, with nothing heavy imported until a verb needs it."""

from __future__ import annotations

from everlora.cli.application import app, main

__all__ = ["app", "main"]
