"""From what the user names to a local folder of weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from everlora.errors import ModelError
from everlora.places import SHARED_VARIABLE, shared_folder

__all__ = ["resolve_source"]

_PACKAGE_PREFIX = "package:"
_SHARED_PREFIX = "shared:"
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def resolve_source(source: str | Path) -> Path:
    """Find the local folder of a model; a hub id is downloaded when it is not in the hub's cache.

    Args:
        source: a local folder, a hub id `owner/name`, `"packaged"` for the network that comes with everlora,
            `"package:<python package>/<folder>"` for one that lies inside an installed package, or
            `"shared:<folder>"` for one below `$EVERLORA_SHARED/models` (`../shared/models` without the variable).

    Raises:
        ModelError: nothing is found under that name.
    """
    text = str(source)
    if text == "packaged":
        return _packaged()
    if text.startswith(_PACKAGE_PREFIX):
        return _inside_package(text)
    if text.startswith(_SHARED_PREFIX):
        return _among_shared(text)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"expected a folder of model weights, found the file {text}; name the folder that holds it")
    if isinstance(source, Path) or _looks_like_path(text):
        raise ModelError(f"expected a folder of model weights, found nothing at {text}; check the path")
    return _from_hub(text)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or not text.strip()


def _packaged() -> Path:
    # Imported here because a build may leave the weights out, and nothing else needs them.
    try:
        from everlora.weights import packaged_model
    except ImportError as error:
        raise ModelError("expected the packaged model, found none in this installation; reinstall everlora") from error
    folder = Path(packaged_model())
    if not folder.is_dir():
        raise ModelError("expected the packaged model, found none in this installation; reinstall everlora")
    return folder


def _inside_package(text: str) -> Path:
    package, _, inner = text.removeprefix(_PACKAGE_PREFIX).partition("/")
    parts = Path(inner).parts
    if not package.isidentifier() or not parts or ".." in parts or Path(inner).is_absolute():
        raise ModelError(f"expected package:<python package>/<folder>, found {text!r}; name both parts")
    # Finding the spec of a top-level package does not run its code.
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise ModelError(f"expected the installed package {package} of {text!r}, found none; install it first")
    for place in places:
        if (folder := Path(place) / inner).is_dir():
            return folder
    raise ModelError(f"expected the folder {inner} in package {package}, found none; check the name in {text!r}")


def _among_shared(text: str) -> Path:
    inner = text.removeprefix(_SHARED_PREFIX)
    if not Path(inner).parts or ".." in Path(inner).parts or Path(inner).is_absolute():
        raise ModelError(f"expected shared:<folder>, found {text!r}; name a folder of shared models")
    folder = shared_folder() / "models" / inner
    if not folder.is_dir():
        raise ModelError(
            f"expected the folder models/{inner} below ${SHARED_VARIABLE} for {text!r}, found none; set the variable "
            "to the folder that holds models/, or name the model's own folder"
        )
    return folder


def _from_hub(name: str) -> Path:
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
    except HFValidationError as error:
        raise ModelError(f"expected a folder or a hub id, found {name!r}, which is neither; check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"expected a local folder or a model on the hub, found neither for {name!r} ({reason}); "
            "check the name and the network, or name a local folder"
        ) from error
    return folder
