"""Folders outside a learner that the environment names: everlora's caches, and data and models shared on a machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SHARED_VARIABLE", "cache_folder", "shared_folder"]

SHARED_VARIABLE = "EVERLORA_SHARED"


def cache_folder() -> Path:
    """Return the folder of everlora's caches; it is not created here.

    `$EVERLORA_CACHE`, else `everlora` in `$HF_HOME`, `$XDG_CACHE_HOME` or `~/.cache`.
    """
    if os.environ.get("EVERLORA_CACHE"):
        return Path(os.environ["EVERLORA_CACHE"])
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "everlora"
    return Path.home() / ".cache" / "everlora"


def shared_folder() -> Path:
    """Return the folder that holds `data` and `models` shared on this machine, whether it is there or not.

    `$EVERLORA_SHARED`, else `../shared`.
    """
    return Path(os.environ.get(SHARED_VARIABLE) or Path(os.pardir) / "shared")
