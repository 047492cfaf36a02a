"""The network that comes with the library, found without importing torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from everlora.errors import ModelError

__all__ = ["PACKAGED", "packaged_model"]

PACKAGED = "packaged"
"""The name that stands for the packaged network wherever a model is asked for."""

_FOLDER = "vit-tiny-imagenet-32"


def packaged_model() -> Path:
    """Return the folder of the packaged vision transformer, in the Hugging Face layout.

    Its `README.md` is the model card, `LICENSE-WEIGHTS.md` the terms of the weights (non-commercial).

    Raises:
        ModelError: the installation lacks the files.
    """
    folder = Path(str(files(__name__))) / _FOLDER
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"expected the packaged model in {folder}, found no model.safetensors; reinstall everlora")
    return folder
