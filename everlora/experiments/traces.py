"""What a learner leaves behind: its size at the start, the bytes it keeps, and the tensors that it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from everlora.backbones import Backbone, load_backbone
from everlora.kept_rows import KEPT_FILE
from everlora.learner import Learner

__all__ = ["bytes_on_disk", "fresh_backbone", "pretrained_digest", "reference_parameters", "tensor_digests"]


def fresh_backbone(learner: Learner) -> Backbone:
    """Load the learner's pretrained model anew, without anything that was attached or learned."""
    kind = "causal_lm" if learner.backbone.modality == "language" else "encoder"
    return load_backbone(learner.backbone.source, kind=kind, **learner.settings.as_parts()["model"])


def reference_parameters(learner: Learner, num_classes: int) -> int:
    """Parameters that growth is measured by: the pretrained encoder and a linear head of the first task's size.

    Args:
        learner: says which model, with which options.
        num_classes: classes of the first task.
    """
    fresh = fresh_backbone(learner)
    return fresh.num_parameters + (fresh.feature_dim + 1) * num_classes


def bytes_on_disk(learner: Learner) -> int:
    """Bytes a learner needs to predict and to go on: its tasks' folders and its newest state.

    The pretrained model is not among them, nor are rows that were kept for validation.
    """
    folders = [learner.path / entry.folder for entry in learner.tasks]
    states = sorted((learner.path / "state").glob("*"))
    files = [path for folder in [*folders, *states[-1:]] for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.name != KEPT_FILE)


def pretrained_digest(learner: Learner) -> str:
    """Sha256 over the tensors of the pretrained network, read anew from its files."""
    tensors = fresh_backbone(learner).model.state_dict()
    return _digest(tensors.items())


def tensor_digests(learner: Learner) -> dict[str, Any]:
    """Hash what is in memory now.

    Returns:
        `pretrained`: as `pretrained_digest`, over the same tensors where they are now; `tasks`: for each learned task
        the sha256 over all that the method holds for it alone.
    """
    learner.method.activate(None)
    now = learner.model.state_dict()
    places = {name: _place(name, now) for name in fresh_backbone(learner).model.state_dict()}
    state = learner.method.state()
    tasks = [
        _digest((key, value) for key, value in state.items() if key.startswith(f"tasks/{entry.index:03d}/"))
        for entry in learner.tasks
    ]
    return {"pretrained": _digest((name, now.get(place)) for name, place in places.items()), "tasks": tasks}


def _place(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Name of a pretrained tensor in a network whose layers may have been wrapped: the layer is then its `base`."""
    layer, _, leaf = name.rpartition(".")
    return name if name in tensors else f"{layer}.base.{leaf}"


def _digest(entries: Iterable[tuple[str, Any]]) -> str:
    """Hash names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(entries, key=lambda entry: entry[0]):
        digest.update(f"{name}\x1f".encode())
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
