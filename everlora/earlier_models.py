"""What an earlier run left in a folder, read and verified for a method that goes on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everlora.backbones.tokens import EncodedTokens
from everlora.errors import ModelError, StoreError
from everlora.methods.base import State
from everlora.methods.earlier import ContinuesEarlierModel, EarlierFolders, EarlierModel
from everlora.peft_folders import Factors, factors_and_scales, read_factors
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from everlora.store import LearnerStore

__all__ = ["continue_earlier", "read_earlier"]

_LEARNER_FILE = "learner.json"
_ROWS = "buffer/rows/"
Found = tuple[Factors, dict[str, float]]
Fit = Callable[[EncodedTokens], EncodedTokens]


def continue_earlier(
    method: ContinuesEarlierModel, *, base_sha256: str | None = None, fit: Fit | None = None
) -> str | None:
    """Let a newly made method go on from the folder that its options name, if they name one.

    Args:
        method: newly made.
        base_sha256: of the base model, to compare with the earlier learner's.
        fit: cuts rows that were encoded for a longer `max_length`.

    Returns:
        Sha256 of what was taken over.

    Raises:
        StoreError: the folder, or something in it, is missing or damaged.
        ModelError: it was made with another base model.
        OptionError: it does not fit the method's options.
        TargetError: its adapters are of other layers.
        ShapeError: its adapters are of another rank.
    """
    folders = method.earlier_folders()
    if folders is None:
        return None
    earlier = read_earlier(folders, base_sha256=base_sha256)
    carried = earlier.carried if fit is None else _fitted(earlier.carried, fit)
    method.continue_from(replace(earlier, carried=carried))
    return _fingerprint(earlier)


def read_earlier(folders: EarlierFolders, *, base_sha256: str | None = None) -> EarlierModel:
    """Read the adapters of an earlier run, and what its method carried on, where the folder is a learner's.

    Raises:
        StoreError: there is no adapter, or a file is missing or damaged.
        ModelError: it was made with another base model.
    """
    place = _Place.of(Path(folders.model), base_sha256)
    first = place.adapter(folders.adapter)
    plain = first is None
    first = first or place.adapter(".")
    if first is None:
        raise StoreError(
            f"expected an adapter in {place.folder}, in '{folders.adapter}' or as a plain PEFT folder, found none; "
            "name a learner, one of its tasks, or an adapter."
        )
    # never the folder itself, which is where PEFT puts the adapter that is trained
    second = next((found for name in folders.second if (found := place.adapter(name)) is not None), None)
    return EarlierModel(
        source=str(place.folder),
        adapter=first[0],
        scales=first[1],
        second=None if second is None else second[0],
        second_scales={} if second is None else second[1],
        carried={} if plain else place.carried,
        is_plain=plain,
        tried=tuple(str(place.folder / name) for name in folders.second),
    )


@dataclass(frozen=True)
class _Place:
    """A folder with adapters, plain or of a learner's task."""

    folder: Path
    store: LearnerStore | None = None
    index: int = 0
    carried: State = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, base_sha256: str | None) -> _Place:
        if (path / _LEARNER_FILE).is_file():
            store = LearnerStore.open(path)
            if not store.tasks:
                raise StoreError(f"{path} has learned no task, so there is nothing to go on from.")
            return cls._of_task(store, len(store.tasks) - 1, base_sha256)
        if (path.parent.parent / _LEARNER_FILE).is_file():
            store = LearnerStore.open(path.parent.parent)
            for entry in store.tasks:
                if Path(entry.folder).name == path.name:
                    return cls._of_task(store, entry.index, base_sha256)
        if not path.is_dir():
            raise StoreError(f"there is no folder {path} to go on from.")
        return cls(path)

    @classmethod
    def _of_task(cls, store: LearnerStore, index: int, base_sha256: str | None) -> _Place:
        found = store.header.get("base_sha256")
        if None not in (base_sha256, found) and found != base_sha256:
            raise ModelError(f"{store.root} was made with another base model (sha256 {str(found)[:12]}...).")
        arrays, values = store.read_state(index)
        carried: State = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return cls(store.root / store.tasks[index].folder, store, index, {**carried, **values})

    def adapter(self, name: str) -> Found | None:
        """The adapter in a folder below, or at a full path; None where there is none."""
        folder = self.folder / name
        if self.store is None or Path(name).is_absolute():
            return read_factors(folder) if (folder / ADAPTER_CONFIG).is_file() else None
        return self._of_learner(self.store, "" if name == "." else f"{name}/")

    def _of_learner(self, store: LearnerStore, prefix: str) -> Found | None:
        task = store.read_task(self.index)
        if prefix + ADAPTER_CONFIG in task.files:
            arrays = task.arrays(prefix + ADAPTER_WEIGHTS)
            tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
            return factors_and_scales(task.document(prefix + ADAPTER_CONFIG), tensors, self.folder / prefix)
        return self._carried(prefix, task.record["values"].get("alphas") or {}) if prefix else None

    def _carried(self, prefix: str, alphas: Mapping[str, float]) -> Found | None:
        """An adapter that was carried on instead of being written with the task."""
        ups = [key for key in self.carried if key.startswith(prefix) and key.endswith("/up")]
        names = [key.removeprefix(prefix).removesuffix("/up") for key in ups]
        factors = {name: (self.carried[f"{prefix}{name}/down"], self.carried[f"{prefix}{name}/up"]) for name in names}
        scales = {name: alphas.get(name, len(down)) / len(down) for name, (down, _) in factors.items()}
        return (factors, scales) if factors else None


def _fitted(carried: State, fit: Fit) -> State:
    """Cut the rows of a carried buffer to what the model takes now."""
    arrays = {key.removeprefix(_ROWS): value.numpy() for key, value in carried.items() if key.startswith(_ROWS)}
    if not arrays:
        return carried
    rows = fit(EncodedTokens.from_arrays(arrays)).arrays()
    return {**carried, **{_ROWS + name: torch.from_numpy(array) for name, array in rows.items()}}


def _fingerprint(earlier: EarlierModel) -> str:
    digest = hashlib.sha256()
    for factors in (earlier.adapter, earlier.second or {}):
        for name, pair in sorted(factors.items()):
            digest.update(name.encode())
            for factor in pair:
                digest.update(np.ascontiguousarray(factor.numpy()).tobytes())
    for key, value in sorted(earlier.carried.items()):
        digest.update(key.encode() + _bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    return value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
