"""The two exports: merged weights, and a PEFT adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import everlora
from everlora.backbones.base import Backbone
from everlora.backbones.cifar_resnet import CifarResNetBackbone
from everlora.backbones.huggingface import HuggingFaceBackbone, quiet_transformers
from everlora.errors import ModelError, ShapeError, UnsupportedError
from everlora.export.adapter import changed_modules, collect_factors
from everlora.export.card import write_card
from everlora.export.cifar_resnet import CifarResNetLayout
from everlora.export.folder import new_folder, write_json
from everlora.export.head import ExportHead
from everlora.export.huggingface import HuggingFaceLayout
from everlora.export.layout import Layout
from everlora.export.plain import merged_state
from everlora.lowrank import AdaptedLayer
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS

__all__ = ["EXPORT_INFO", "ExportReport", "base_location", "export_merged", "export_peft"]

logger = logging.getLogger("everlora.export")

EXPORT_INFO = "export.json"
# Largest relative difference of a logit that rounding explains; beyond it the export is refused.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; `export.json` in the folder says the same.

    Attributes:
        folder: where it lies.
        model_class: class that loads the weights: one of transformers, or of the code in the folder.
        has_classifier: the class computes the logits itself; else the head lies beside.
        max_difference: largest difference of a logit from the learner's on the probe batch.
        truncation: relative Frobenius error of each layer's update, where its rank was cut; empty when nothing was.
    """

    folder: Path
    model_class: str
    has_classifier: bool
    max_difference: float
    truncation: Mapping[str, float] = field(default_factory=dict)


def export_merged(
    backbone: Backbone,
    layers: Mapping[str, AdaptedLayer],
    head: ExportHead,
    folder: str | Path,
    *,
    card: Mapping[str, Any],
    probe: Any = None,
) -> ExportReport:
    """Write the network as it is in place, adapters merged, as one plain model with its classifier, inputs and README.

    Models of transformers become one of transformers. The small residual networks become plain weights by their
    published names, with the network's code beside them.

    Args:
        backbone: with the adapted layers in place; not changed.
        layers: name to adapted layer, as `attach` returned them; may be empty.
        head: the classifier.
        folder: new or empty.
        card: facts for the README, see `everlora.export.card.write_card`.
        probe: images or texts on which learner and export are compared; a few made-up ones when omitted.

    Raises:
        UnsupportedError: the backbone is of another kind, or its network has parts that a plain one has not.
        StoreError: `folder` is in use or cannot be written.
        ModelError: the written model does not give the learner's logits.
        ShapeError: the head does not fit the features.
    """
    layout = _layout(backbone, head)
    _check(backbone, layers, head)
    with new_folder(folder) as unfinished, quiet_transformers():
        layout.write_model(unfinished, merged_state(backbone.model))
        difference = _finish(layout, unfinished, card, probe, model=layout.load(unfinished))
    return ExportReport(Path(folder), layout.model_class, layout.has_classifier, difference)


def export_peft(
    backbone: Backbone,
    layers: Mapping[str, AdaptedLayer],
    head: ExportHead,
    folder: str | Path,
    *,
    card: Mapping[str, Any],
    probe: Any = None,
    max_rank: int | None = None,
) -> ExportReport:
    """Write the adapters as one PEFT LoRA adapter of the base model, with the classifier beside it.

    The factors of all blocks stand side by side, with each block's scale; modules without factors that are not the
    base's any more, such as norms of a task's own, travel along whole. With `max_rank`, layers of a higher total rank
    are replaced by the nearest update of that rank, with the error reported; such an adapter need not give the
    learner's logits. The other arguments and errors are those of `export_merged`; further:

    Raises:
        UnsupportedError: no layer has a low-rank block, or the base's own weights under one were trained.
        OptionError: `max_rank` is not a positive integer.
    """
    base = base_location(backbone)
    layout = _layout(backbone, head, base)
    _check(backbone, layers, head)
    adapter = collect_factors(backbone.model, layers, max_rank)
    with new_folder(folder) as unfinished, quiet_transformers():
        plain = layout.load(backbone.folder)
        saved = changed_modules(backbone.model, plain.state_dict(), adapter, unread=layout.unread)
        tensors = adapter.tensors(backbone.model, saved)
        save_file(tensors, unfinished / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = adapter.config(backbone.model, saved, base=base, base_class=layout.base_class)
        write_json(unfinished / ADAPTER_CONFIG, config)
        # Heavy, and needed by this kind of export only.
        from peft import PeftModel

        model = PeftModel.from_pretrained(plain, str(unfinished))
        difference = _finish(layout, unfinished, card, probe, model=model, truncation=adapter.truncation)
    return ExportReport(Path(folder), layout.model_class, False, difference, adapter.truncation)


def base_location(backbone: Backbone) -> str:
    """Name under which plain tools find the base: the hub id, or the local folder."""
    source = backbone.source
    is_hub_id = not Path(source).exists() and source != "packaged" and not source.startswith(("package:", "shared:"))
    return source if is_hub_id else str(backbone.folder.resolve())


def _layout(backbone: Backbone, head: ExportHead, base: str | None = None) -> Layout:
    if isinstance(backbone, HuggingFaceBackbone):
        return HuggingFaceLayout(backbone, head, base)
    if isinstance(backbone, CifarResNetBackbone):
        return CifarResNetLayout(backbone, head, base)
    raise UnsupportedError(
        f"export writes models of transformers and small residual networks, and {backbone.architecture} is neither; "
        "predict with the learner itself"
    )


def _check(backbone: Backbone, layers: Mapping[str, AdaptedLayer], head: ExportHead) -> None:
    if head.weight.shape[1] != backbone.feature_dim:
        raise ShapeError(
            f"expected a head for {backbone.feature_dim} features, found one for {head.weight.shape[1]}; "
            "pass the head that was trained on this model"
        )
    attached = dict(backbone.model.named_modules(remove_duplicate=False))
    absent = sorted(name for name, layer in layers.items() if attached.get(name) is not layer)
    if absent:
        raise ModelError(f"expected layer {absent[0]} in the model, found it detached; export while it is attached")


def _finish(
    layout: Layout,
    folder: Path,
    card: Mapping[str, Any],
    probe: Any,
    *,
    model: Any,
    truncation: Mapping[str, float] | None = None,
) -> float:
    """Add inputs, head, README and export.json to a folder, and compare what it loads to, `model`, with the learner."""
    layout.write_inputs(folder)
    if not layout.has_classifier:
        layout.head.save(folder)
    difference = _compare(layout, model, _default_probe(layout) if probe is None else probe, exact=not truncation)
    logger.info("export to %s differs from the learner by at most %.2g in a logit", folder, difference)
    (folder / "README.md").write_text(
        write_card(layout, card, max_difference=difference, truncation=truncation), encoding="utf-8"
    )
    write_json(
        folder / EXPORT_INFO,
        {
            "format": 1,
            "kind": "merged" if layout.base is None else "peft",
            "model_class": layout.model_class,
            "has_classifier": layout.has_classifier,
            "max_logit_difference": difference,
            "truncation": dict(truncation or {}),
            "everlora": everlora.__version__,
            "transformers": transformers.__version__,
        },
    )
    return difference


def _default_probe(layout: Layout) -> Any:
    if layout.backbone.modality == "text":
        return ["a", "where is my parcel?", *layout.head.classes[:6]]
    size = layout.backbone.image_size or 64
    return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)


def _compare(layout: Layout, model: Any, probe: Any, *, exact: bool) -> float:
    """Largest difference between the learner's logits and those of the written model, on the same pixels or tokens."""
    backbone = layout.backbone
    encoded = backbone.encode(probe)
    batch = backbone.collate(encoded, np.arange(len(encoded)))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    # On the learner's own device: between devices float32 convolutions may differ by more than rounding.
    model.to(backbone.device).eval()
    try:
        with torch.no_grad():
            expected = layout.head.logits(backbone.features(batch)).cpu()
            found: Tensor = layout.logits(model, batch).cpu()
    finally:
        for module, training in modes:
            module.training = training
    difference = float((expected - found).abs().max())
    allowed = _TOLERANCE[layout.dtype] * max(1.0, float(expected.abs().max()))
    if exact and not difference <= allowed:
        raise ModelError(
            f"expected the export to give the learner's logits, found a difference of {difference:.3g} where rounding "
            f"explains {allowed:.3g}; please report the architecture {backbone.architecture}"
        )
    return difference
