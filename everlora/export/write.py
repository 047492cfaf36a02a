"""The two exports: merged weights, and a PEFT adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import everlora
from everlora.backbones.base import Backbone
from everlora.backbones.huggingface import HuggingFaceBackbone, quiet_transformers
from everlora.backbones.images import ImageInputs
from everlora.backbones.pooling import pool
from everlora.errors import ModelError, ShapeError, UnsupportedError
from everlora.export.card import write_card
from everlora.export.classifiers import build_classifier, build_encoder, classifier_for, takes_pooler
from everlora.export.folder import new_folder
from everlora.export.head import ExportHead
from everlora.export.snippet import Snippet
from everlora.lowrank import Direction, FusedProjection, LowRankLinear, compress, join_factors
from everlora.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_config, to_peft_tensors

__all__ = ["EXPORT_INFO", "ExportReport", "base_location", "export_merged", "export_peft"]

logger = logging.getLogger("everlora.export")

EXPORT_INFO = "export.json"
_BATCH_KEYS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")
# Largest relative difference of a logit that rounding explains; beyond it the export is refused.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; `export.json` in the folder says the same.

    Attributes:
        folder: where it lies.
        model_class: class of transformers that loads the weights.
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
    layers: Mapping[str, LowRankLinear],
    head: ExportHead,
    folder: str | Path,
    *,
    card: Mapping[str, Any],
    probe: Any = None,
) -> ExportReport:
    """Write base and adapters as one plain model of transformers, with its classifier, processor and README.

    Args:
        backbone: with the adapted layers in place; not changed.
        layers: name to adapted layer, as `attach` returned them; may be empty.
        head: the classifier.
        folder: new or empty.
        card: facts for the README, see `everlora.export.card.write_card`.
        probe: images or texts on which learner and export are compared; a few made-up ones when omitted.

    Raises:
        UnsupportedError: the backbone is not a model of transformers.
        StoreError: `folder` is in use or cannot be written.
        ModelError: the written model does not give the learner's logits.
        ShapeError: the head does not fit the features.
    """
    encoder = _checked(backbone, layers, head)
    classifier = classifier_for(encoder, head)
    snippet = Snippet(encoder, head, classifier=classifier)
    with new_folder(folder) as unfinished, quiet_transformers():
        model = build_encoder(encoder, head) if classifier is None else build_classifier(encoder, head)
        model.save_pretrained(unfinished)
        difference = _finish(snippet, unfinished, card, probe)
    return ExportReport(Path(folder), snippet.model_class, classifier is not None, difference)


def export_peft(
    backbone: Backbone,
    layers: Mapping[str, LowRankLinear],
    head: ExportHead,
    folder: str | Path,
    *,
    card: Mapping[str, Any],
    probe: Any = None,
    max_rank: int | None = None,
) -> ExportReport:
    """Write the adapters as one PEFT LoRA adapter of the base model, with the classifier beside it.

    The factors of all blocks stand side by side, each block's scale taken into its up-projection, so PEFT's own
    scaling is 1. With `max_rank`, layers of a higher total rank are replaced by the nearest update of that rank, with
    the error reported; such an adapter need not give the learner's logits. The other arguments and errors are those of
    `export_merged`; further:

    Raises:
        UnsupportedError: no layer has a low-rank block.
        OptionError: `max_rank` is not a positive integer.
    """
    encoder = _checked(backbone, layers, head)
    factors = {name: _all_factors(layer) for name, layer in sorted(layers.items())}
    factors = join_factors(encoder.model, factors)  # PEFT adapts the base's own layers
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    truncation: dict[str, float] = {}
    if max_rank is not None:
        factors, truncation = _truncated(factors, max_rank)
    model_class = type(encoder.model)
    base = base_location(encoder)
    config = lora_config(
        {name: down.shape[0] for name, (down, _) in factors.items()},
        base_model=base,
        base_class=(model_class.__name__, model_class.__module__),
        transposed=_any_transposed(encoder.model, factors),
    )
    with new_folder(folder) as unfinished, quiet_transformers():
        save_file(to_peft_tensors(factors), unfinished / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _write_json(unfinished / ADAPTER_CONFIG, config)
        difference = _finish(Snippet(encoder, head, base=base), unfinished, card, probe, truncation=truncation)
    return ExportReport(Path(folder), model_class.__name__, False, difference, truncation)


def base_location(backbone: Backbone) -> str:
    """Name under which plain transformers finds the base: the hub id, or the local folder."""
    source = backbone.source
    is_hub_id = not Path(source).exists() and source != "packaged" and not source.startswith("package:")
    return source if is_hub_id else str(backbone.folder.resolve())


def _checked(backbone: Backbone, layers: Mapping[str, LowRankLinear], head: ExportHead) -> HuggingFaceBackbone:
    if not isinstance(backbone, HuggingFaceBackbone):
        raise UnsupportedError(
            f"export writes models of transformers, and {backbone.architecture} is none; "
            "predict with the learner itself"
        )
    if head.weight.shape[1] != backbone.feature_dim:
        raise ShapeError(
            f"expected a head for {backbone.feature_dim} features, found one for {head.weight.shape[1]}; "
            "pass the head that was trained on this model"
        )
    attached = dict(backbone.model.named_modules(remove_duplicate=False))
    absent = sorted(name for name, layer in layers.items() if attached.get(name) is not layer)
    if absent:
        raise ModelError(f"expected layer {absent[0]} in the model, found it detached; export while it is attached")
    return backbone


def _all_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """Past and current block as one pair `(down, up)`, scales inside `up`, float32 on the CPU."""
    down = torch.cat([layer.past_down, layer.down]).detach()
    up = torch.cat([layer.past_up * layer.past_scale, layer.up], dim=1).detach()
    return down.float().cpu().contiguous(), up.float().cpu().contiguous()


def _any_transposed(model: nn.Module, names: Iterable[str]) -> bool:
    wholes = [model.get_submodule(name) for name in names]
    return any(isinstance(whole, FusedProjection) and whole.is_transposed for whole in wholes)


def _truncated(
    factors: Mapping[str, tuple[Tensor, Tensor]], max_rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Cut pairs `(down, up)` to a rank at the least error; return them and the relative errors of those cut."""
    cut = dict(factors)
    errors = {}
    for name, (down, up) in factors.items():
        compressed = compress([Direction(down, up)], None, max_rank)  # checks the rank even where nothing is cut
        if down.shape[0] > max_rank:
            pair = compressed.direction
            cut[name] = pair.down.float().contiguous(), pair.up.float().contiguous()
            errors[name] = compressed.error_rel
    return cut, errors


def _finish(
    snippet: Snippet,
    folder: Path,
    card: Mapping[str, Any],
    probe: Any,
    *,
    truncation: Mapping[str, float] | None = None,
) -> float:
    """Add processor, head, README and export.json to a folder, and compare what it loads to with the learner."""
    inputs = snippet.backbone.inputs
    if isinstance(inputs, ImageInputs):
        _write_json(folder / "preprocessor_config.json", inputs.transform.processor_config())
    else:
        inputs.tokenizer.save_pretrained(folder)
    if snippet.classifier is None:
        snippet.head.save(folder)
    exact = not truncation
    difference = _compare(snippet, folder, _default_probe(snippet) if probe is None else probe, exact=exact)
    (folder / "README.md").write_text(
        write_card(snippet, card, max_difference=difference, truncation=truncation), encoding="utf-8"
    )
    _write_json(
        folder / EXPORT_INFO,
        {
            "format": 1,
            "kind": "merged" if snippet.base is None else "peft",
            "model_class": snippet.model_class,
            "has_classifier": snippet.classifier is not None,
            "max_logit_difference": difference,
            "truncation": dict(truncation or {}),
            "everlora": everlora.__version__,
            "transformers": transformers.__version__,
        },
    )
    return difference


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _default_probe(snippet: Snippet) -> Any:
    if snippet.backbone.modality == "text":
        return ["a", "where is my parcel?", *snippet.head.classes[:6]]
    size = snippet.backbone.image_size or 64
    return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)


def _compare(snippet: Snippet, folder: Path, probe: Any, *, exact: bool) -> float:
    """Largest difference between the learner's logits and those of the written model, on the same pixels or tokens."""
    backbone = snippet.backbone
    encoded = backbone.encode(probe)
    batch = backbone.collate(encoded, np.arange(len(encoded)))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            expected = snippet.head.logits(backbone.features(batch)).cpu()
            found = _written_logits(snippet, folder, batch).cpu()
    finally:
        for module, training in modes:
            module.training = training
    difference = float((expected - found).abs().max())
    allowed = _TOLERANCE[backbone.dtype] * max(1.0, float(expected.abs().max()))
    if exact and not difference <= allowed:
        raise ModelError(
            f"expected the export to give the learner's logits, found a difference of {difference:.3g} where rounding "
            f"explains {allowed:.3g}; please report the architecture {backbone.architecture}"
        )
    logger.info("export to %s differs from the learner by at most %.2g in a logit", folder, difference)
    return difference


def _written_logits(snippet: Snippet, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    backbone = snippet.backbone
    options: dict[str, Any] = {"dtype": backbone.dtype, "local_files_only": True}
    if snippet.classifier is None and takes_pooler(backbone.model):
        options["add_pooling_layer"] = backbone.pooling == "pooler"
    place = folder if snippet.base is None else backbone.folder
    model = getattr(transformers, snippet.model_class).from_pretrained(place, **options)
    if snippet.base is not None:
        # Heavy, and needed by this kind of export only.
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    # On the learner's own device: between devices float32 convolutions may differ by more than rounding.
    model.to(backbone.device).eval()
    arguments: dict[str, Any] = {key: value for key, value in batch.items() if key in _BATCH_KEYS}
    if "pixel_values" in arguments:
        arguments["pixel_values"] = arguments["pixel_values"].to(backbone.dtype)
    if backbone.interpolate:
        arguments["interpolate_pos_encoding"] = True
    output = model(**arguments)
    if snippet.classifier is not None:
        return output.logits  # type: ignore[no-any-return]
    features = pool(output, backbone.pooling, mask=batch.get("attention_mask"), num_prefix=backbone.num_prefix)
    return snippet.head.logits(features)
