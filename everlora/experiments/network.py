"""Whether the model and data hub can be used, asked once and without waiting."""

from __future__ import annotations

import functools
import logging
import os
import urllib.request
from pathlib import Path

from datasets import config as datasets_config
from huggingface_hub import constants

__all__ = ["hub_copy_is_here", "hub_is_reachable"]

_PATIENCE_SECONDS = 3.0

logger = logging.getLogger(__name__)


def hub_copy_is_here(dataset: str) -> bool:
    """Whether data set `dataset` (a hub id) lies in the cache already, prepared or as downloaded files."""
    prepared = Path(datasets_config.HF_DATASETS_CACHE) / dataset.replace("/", "___").lower()
    return prepared.is_dir()


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers within seconds; `False` without asking when an environment variable says offline."""
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS):
            return True
    except (OSError, ValueError) as error:
        logger.info("the hub does not answer (%s); local copies are used", type(error).__name__)
        return False
