"""The two exports: merged weights, and a PEFT adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import everlora
from everlora.backbones.base import Backbone
from everlora.backbones.cifar_resnet import CifarResNetBackbone
from everlora.backbones.huggingface import HuggingFaceBackbone, quiet_transformers
from everlora.errors import ModelError, UnsupportedError
from everlora.export.adapter import PeftAdapter, changed_modules, collect_factors
from everlora.export.card import write_card
from everlora.export.cifar_resnet import CifarResNetLayout
from everlora.export.folder import new_folder, write_json
from everlora.export.head import ExportHead
from everlora.export.huggingface import HuggingFaceLayout
from everlora.export.layout import ClassifierLayout, Layout
from everlora.export.lineage import lineage_of
from everlora.export.plain import merged_state
from everlora.lowrank import AdaptedLayer
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS

__all__ = [
    "EXPORT_INFO",
    "ExportReport",
    "base_location",
    "export_merged",
    "export_peft",
    "require_attached",
    "write_adapter",
    "write_merged",
    "write_notes",
]

logger = logging.getLogger("everlora.export")

EXPORT_INFO = "export.json"


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
    return write_merged(_layout(backbone, head), layers, folder, card=card, probe=probe)


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
    layout = _layout(backbone, head, base_location(backbone))
    require_attached(backbone, layers)
    layout.check()
    adapter = collect_factors(backbone.model, layers, max_rank)
    with new_folder(folder) as unfinished, quiet_transformers():
        layout.write_inputs(unfinished)
        difference = write_adapter(layout, adapter, unfinished, probe)
        write_notes(layout, unfinished, card, max_difference=difference, truncation=adapter.truncation)
    return ExportReport(Path(folder), layout.model_class, layout.has_classifier, difference, adapter.truncation)


def write_merged(
    layout: Layout,
    layers: Mapping[str, AdaptedLayer],
    folder: str | Path,
    *,
    card: Mapping[str, Any],
    probe: Any = None,
) -> ExportReport:
    """Write the network as it is in place as one plain model; arguments and errors are those of `export_merged`."""
    require_attached(layout.backbone, layers)
    layout.check()
    with new_folder(folder) as unfinished, quiet_transformers():
        layout.write_model(unfinished, merged_state(layout.backbone.model))
        layout.write_inputs(unfinished)
        difference = _compare(layout, layout.load(unfinished), probe, exact=True)
        write_notes(layout, unfinished, card, max_difference=difference)
    return ExportReport(Path(folder), layout.model_class, layout.has_classifier, difference)


def write_adapter(layout: Layout, adapter: PeftAdapter, folder: Path, probe: Any = None) -> float:
    """Write PEFT's two files, and compare what plain PEFT loads from them with the network in place.

    Args:
        layout: of the network.
        adapter: of the same network.
        folder: exists.
        probe: as in `export_merged`.

    Returns:
        The largest difference of a logit.

    Raises:
        ModelError: it is more than rounding explains, though nothing was cut.
        UnsupportedError: the base's own weights under a layer were trained.
    """
    assert layout.base is not None
    model = layout.backbone.model
    plain = layout.load(layout.backbone.folder)
    saved = changed_modules(model, plain.state_dict(), adapter, unread=layout.unread)
    layout.check_saved(saved)
    config = adapter.config(model, saved, base=layout.base, base_class=layout.base_class)
    save_file(adapter.tensors(model, saved), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, config)
    # Heavy, and needed by this kind of export only.
    from peft import PeftModel

    return _compare(layout, PeftModel.from_pretrained(plain, str(folder)), probe, exact=not adapter.truncation)


def base_location(backbone: Backbone) -> str:
    """Name under which plain tools find the base: the hub id, or the local folder."""
    source = backbone.source
    is_hub_id = not Path(source).exists() and source != "packaged" and not source.startswith(("package:", "shared:"))
    return source if is_hub_id else str(backbone.folder.resolve())


def require_attached(backbone: Backbone, layers: Mapping[str, AdaptedLayer]) -> None:
    """Check that adapted layers are in their places.

    Raises:
        ModelError: one is not.
    """
    attached = dict(backbone.model.named_modules(remove_duplicate=False))
    absent = sorted(name for name, layer in layers.items() if attached.get(name) is not layer)
    if absent:
        raise ModelError(f"expected layer {absent[0]} in the model, found it detached; export while it is attached")


def write_notes(
    layout: Layout,
    folder: Path,
    card: Mapping[str, Any],
    *,
    max_difference: float,
    truncation: Mapping[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `README.md` and `export.json`.

    Args:
        layout: of what was written.
        folder: of the export.
        card: see `everlora.export.card.write_card`.
        max_difference: largest difference of a logit from the learner's on the probe batch.
        truncation: relative error of each layer's update whose rank was cut.
        more: further entries of `export.json`.
    """
    logger.info("export to %s differs from the learner by at most %.2g in a logit", folder, max_difference)
    (folder / "README.md").write_text(
        write_card(layout, card, max_difference=max_difference, truncation=truncation), encoding="utf-8"
    )
    write_json(
        folder / EXPORT_INFO,
        {
            "format": 1,
            "kind": "merged" if layout.base is None else "peft",
            "model_class": layout.model_class,
            "has_classifier": layout.has_classifier,
            "max_logit_difference": max_difference,
            "truncation": dict(truncation or {}),
            "lineage": lineage_of(card),
            "everlora": everlora.__version__,
            "transformers": transformers.__version__,
            **(more or {}),
        },
    )


def _layout(backbone: Backbone, head: ExportHead, base: str | None = None) -> ClassifierLayout:
    if isinstance(backbone, HuggingFaceBackbone):
        return HuggingFaceLayout(backbone, head, base)
    if isinstance(backbone, CifarResNetBackbone):
        return CifarResNetLayout(backbone, head, base)
    raise UnsupportedError(
        f"export writes models of transformers and small residual networks, and {backbone.architecture} is neither; "
        "predict with the learner itself"
    )


def _compare(layout: Layout, model: Any, probe: Any, *, exact: bool) -> float:
    """Largest difference between the learner's logits and those of the written model, on the same pixels or tokens."""
    backbone = layout.backbone
    batch = layout.probe(probe)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    # On the learner's own device: between devices float32 convolutions may differ by more than rounding.
    model.to(backbone.device).eval()
    try:
        with torch.no_grad():
            expected = layout.expected(batch).cpu()
            found = layout.logits(model, batch).cpu()
    finally:
        for module, training in modes:
            module.training = training
    difference = float((expected - found).abs().max())
    allowed = layout.tolerance * max(1.0, float(expected.abs().max()))
    if exact and not difference <= allowed:
        raise ModelError(
            f"expected the export to give the learner's logits, found a difference of {difference:.3g} where rounding "
            f"explains {allowed:.3g}; please report the architecture {backbone.architecture}"
        )
    return difference
