"""The base model of a learner: found, hashed anew, and held against the layers that the adapters name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from everlora.doctor.arrays import Shapes
from everlora.doctor.findings import Finding, broken, warning
from everlora.errors import EverloraError
from everlora.store.layout import LEARNER_FILE

__all__ = ["examine_base", "examine_settings"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself


def examine_settings(header: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that this version knows the method and accepts its options."""
    from everlora.methods import method_spec
    from everlora.settings import Settings

    try:
        Settings.from_parts(method_spec(header["method"]), header["options"])
    except (EverloraError, KeyError, TypeError, AttributeError) as error:
        what = f"names a method or options that this everlora does not take ({error})"
        yield broken(LEARNER_FILE, what, "open it with the version that wrote it")


def examine_base(header: Mapping[str, Any], shapes: Shapes, moved_to: str | Path | None) -> Iterator[Finding]:
    """Hash the base model anew, and compare its layers with those of the adapters.

    Args:
        header: of the learner.
        shapes: of the adapters' factors.
        moved_to: where the base lies now, if it moved.
    """
    from everlora.backbones import model_fingerprint

    source = str(header.get("base_model") if moved_to is None else moved_to)
    where = "say where it lies with --model"
    try:
        folder = _find(source)
        if folder is None:
            yield warning(LEARNER_FILE, f"names the base model '{source}', which is not on this machine", where)
            return
        found = model_fingerprint(folder, use_cache=False)
    except EverloraError as error:
        what = f"names the base model '{source}', which cannot be checked ({str(error).rpartition('; ')[0]})"
        yield warning(LEARNER_FILE, what, where)
        return
    if found != header.get("base_sha256"):
        expected = str(header.get("base_sha256"))[:12]
        what = f"was made with another base model than the one at {source} (sha256 {found[:12]}, expected {expected})"
        yield broken(LEARNER_FILE, what, "give the original with --model, or put it back")
        return
    if header.get("inputs_sha256") is not None:
        yield from _compare_inputs(folder, header, source)
    yield from _compare_layers(folder, shapes)


def _compare_inputs(folder: Path, header: Mapping[str, Any], source: str) -> Iterator[Finding]:
    """Compare what prepares rows with what the learner was made with; its options may say how."""
    from everlora.backbones import fingerprint_of_inputs, load_backbone

    options = header.get("options")
    model = options.get("model") if isinstance(options, Mapping) else None
    given = dict(model) if isinstance(model, Mapping) else {}
    try:
        if header.get("modality") == "language":
            found = fingerprint_of_inputs(folder, template=str(given.get("template", "auto")))
        else:
            found = load_backbone(folder, **given).inputs_fingerprint
    except (EverloraError, TypeError) as error:
        what = f"fixes what prepares rows, which cannot be read at {source} ({str(error).rpartition('; ')[0]})"
        yield broken(LEARNER_FILE, what, "put the original tokenizer or image processor back")
        return
    if found != header["inputs_sha256"]:
        what = (
            f"was made with another tokenizer, template, image processor or pooling than those at {source}, so that "
            "rows become other inputs"
        )
        yield broken(LEARNER_FILE, what, "give the original with --model, or put it back")


def _find(source: str) -> Path | None:
    """The folder of the base model; a model of the hub is looked for in the hub's cache only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from everlora.backbones.source import resolve_source

    looks_local = source == "packaged" or ":" in source or source.count("/") != 1 or source.startswith((".", "/", "~"))
    if looks_local or Path(source).expanduser().exists():
        return resolve_source(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _compare_layers(folder: Path, adapters: Shapes) -> Iterator[Finding]:
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(_shapes_in(file))
    for layer, (down, up) in adapters.items():
        fitting = {(up[0], *down[1:])}
        if len(down) == 2:
            fitting |= {(down[1], up[0])}  # some models keep a weight as (in, out)
        found = _weight_of(layer, weights)
        if found is not None and len(found) == len(down) and found not in fitting:
            what = f"has factors of layer '{layer}' of shapes {down} and {up} for a weight of shape {found}"
            yield broken("tasks", what, "restore the task from a backup")


def _weight_of(layer: str, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of a layer's weight, whose name in the file may have a prefix more or less than in the network."""
    name = f"{layer}.weight"
    found = {shape for key, shape in weights.items() if key == name or f".{key}".endswith(f".{name}")}
    return found.pop() if len(found) == 1 else None


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header alone; nothing where it is not one."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size <= _MAX_HEADER_BYTES else {}
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
