"""One sha256 for a folder of weights, remembered by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from everlora.errors import ModelError
from everlora.places import cache_folder

__all__ = ["fingerprint_of", "model_files", "model_fingerprint", "tokenizer_text"]

logger = logging.getLogger("everlora.backbones")

_PATTERNS = ("config.json", "model*.safetensors", "model*.safetensors.index.json")
_CACHE_FILE = "fingerprints.json"
_CHUNK_BYTES = 1 << 20


def model_files(folder: Path) -> list[Path]:
    """Files that decide what the network computes: its config and its weights, sorted by name."""
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def model_fingerprint(folder: str | Path, *, use_cache: bool = True) -> str:
    """Hash the config and the weights of a model folder.

    Args:
        folder: folder of the weights.
        use_cache: take the hash of a file from the cache when its path, size and time of change are known; with
            `False` every byte is read again.

    Returns:
        sha256 as 64 hexadecimal digits. It depends on names and contents of the files, not on where they lie.

    Raises:
        ModelError: the folder holds no weights, or a file cannot be read.
    """
    root = Path(folder)
    files = model_files(root)
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(
            f"expected model weights in {root} (model.safetensors; other formats are pickles and are not read), found "
            "none; name the folder that has them, or save the model with save_pretrained"
        )
    cache = _read_cache() if use_cache else {}
    known = dict(cache)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{_file_hash(path, cache)}\n".encode())
    if cache != known or not use_cache:
        _write_cache(cache)
    return digest.hexdigest()


def fingerprint_of(*texts: str) -> str:
    """Sha256 over texts, as 64 hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """All that decides what tokens a text becomes, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(sorted(tokenizer.get_vocab().items()))
    content = json.loads(backend.to_str())
    # each call sets these two to what it wants
    return json.dumps({**content, "truncation": None, "padding": None}, sort_keys=True)


def _file_hash(path: Path, cache: dict[str, Any]) -> str:
    """Return the sha256 of one file, from `cache` when it is unchanged; `cache` is brought up to date."""
    try:
        status = path.stat()
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        entry = cache.get(key)
        if isinstance(entry, list) and entry[:2] == stamp and len(entry) == 3 and isinstance(entry[2], str):
            return entry[2]
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(
            f"expected to read {path}, found {error.strerror}; check the file and its permissions"
        ) from error
    cache[key] = [*stamp, digest.hexdigest()]
    return digest.hexdigest()


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads((cache_folder() / _CACHE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(cache: dict[str, Any]) -> None:
    # The cache only saves time: where it cannot be written, the next call hashes again.
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=_CACHE_FILE)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(cache, stream, sort_keys=True)
        os.replace(name, folder / _CACHE_FILE)
    except OSError as error:
        logger.debug("fingerprint cache in %s not written: %s", folder, error)
