"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

import datasets

from everlora.errors import DataError
from everlora.streams.files import DATA_SUFFIXES, SPLIT_NAMES
from everlora.streams.table import Source, table_from_dataset

__all__ = ["is_hub_id", "read_hub"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ANSWER_SECONDS = 3.0
_OFF = ("", "0", "false", "no", "off")


def is_hub_id(text: str) -> bool:
    """Tell whether a string that is no existing path can be the id of a data set on the hub."""
    return bool(_HUB_ID.fullmatch(text)) and not text.lower().endswith(DATA_SUFFIXES)


def read_hub(name: str) -> Source:
    """Load a data set of the hub, from its cache where it lies there.

    Args:
        name: `owner/name` or `name`.

    Returns:
        Its splits.

    Raises:
        DataError: no such data set, no network, or several configurations to choose from.
    """
    offline = any(os.environ.get(key, "").lower() not in _OFF for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    # Asking first keeps a machine without network from waiting through the client's retries.
    reachable = not offline and _hub_answers()
    try:
        with _quiet():
            loaded = datasets.load_dataset(name) if reachable else _load_cached(name)
    except Exception as error:  # the client raises some twenty types, of four libraries
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if reachable and lines else "the hub cannot be reached and it is not cached"
        raise DataError(
            f"'{name}' is neither a file or folder here nor a data set that could be loaded from the hub ({reason}); "
            f"check the spelling, or give the path of a local copy"
        ) from error
    tables = {
        SPLIT_NAMES.get(str(split).lower(), str(split)): table_from_dataset(part, f"{name} ({split})")
        for split, part in loaded.items()
    }
    return Source(tables, is_divided=True)


def _load_cached(name: str) -> Any:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, download_config=datasets.DownloadConfig(local_files_only=True))
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=_ANSWER_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the datasets library from drawing progress bars of its own and from warning about what we report."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
