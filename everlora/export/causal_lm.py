"""Exports of causal language models: one ordinary model folder, or plain adapters for the base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import OptionError, nearest
from everlora.export.adapter import collect_factors
from everlora.export.folder import new_folder
from everlora.export.language_layout import LanguageLayout
from everlora.export.write import (
    ExportReport,
    base_location,
    require_attached,
    write_adapter,
    write_merged,
    write_notes,
)
from everlora.lowrank import AdaptedLayer

__all__ = ["Taught", "export_language"]

_FORMATS = ("merged", "peft")


class Taught(Protocol):
    """What an export asks of a method."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the weights one may predict with, the usual ones first; empty where there is but one choice."""

    def predicting(self, variant: str | None = None) -> AbstractContextManager[None]:
        """Put weights in place inside a `with` block."""

    def layers(self) -> Mapping[str, AdaptedLayer]:
        """Name to adapted layer, as `attach` returned them."""


def export_language(
    method: Taught,
    backbone: CausalLMBackbone,
    folder: str | Path,
    *,
    format: str,
    card: Mapping[str, Any],
    variant: str | None = None,
    max_rank: int | None = None,
) -> ExportReport:
    """Write a causal language model and what it learned.

    `merged` is an ordinary model of transformers, with the weights that predict, or those of `variant`. `peft` is an
    adapter folder; of a method with several kinds of weights one sub-folder each, unless `variant` names one. An
    adapter holds factors alone, all with one scale, so that PEFT and servers such as vLLM load it as it is.

    Args:
        method: that taught the model; not changed.
        backbone: with the method's layers in place.
        folder: new or empty.
        format: `merged` or `peft`.
        card: facts for the README, see `everlora.export.card.write_card`.
        variant: one of the method's `variants`.
        max_rank: of a `peft` adapter; layers of a higher total rank are cut to it, at the least error.

    Raises:
        OptionError: an unknown format or variant, or a rank that is not positive or not for this format.
        UnsupportedError: the base is quantised and cannot be merged into, no layer has a low-rank block, or something
            else than the factors was trained, for which there is no adapter.
        StoreError: `folder` is in use or cannot be written.
        ModelError: what was written does not give the learner's logits.
    """
    if format not in _FORMATS:
        raise OptionError(f"there is no export format '{format}'; {nearest(format, _FORMATS)}")
    _check_variant(method, variant)
    if format == "merged":
        if max_rank is not None:
            raise OptionError("max_rank is for format='peft', found 'merged', which has no rank; leave it out")
        name = variant or next(iter(method.variants), None)
        with method.predicting(variant):
            return write_merged(LanguageLayout(backbone, variant=name), method.layers(), folder, card=card)
    names = method.variants if variant is None else ()
    layout = LanguageLayout(backbone, base_location(backbone), names, variant)
    layout.check()
    differences: list[float] = []
    truncation: dict[str, float] = {}
    with new_folder(folder) as unfinished, quiet_transformers():
        for name in names or (variant,):
            place = unfinished / name if name in names else unfinished
            place.mkdir(exist_ok=True)
            with method.predicting(name):
                require_attached(backbone, method.layers())
                adapter = collect_factors(backbone.model, method.layers(), max_rank)
                differences.append(write_adapter(layout, adapter, place))
            prefix = f"{name}/" if name in names else ""
            truncation |= {f"{prefix}{layer}": error for layer, error in adapter.truncation.items()}
        layout.write_inputs(unfinished)
        largest = max(differences)
        more = {"variants": list(names)} if names else {}
        write_notes(layout, unfinished, card, max_difference=largest, truncation=truncation, more=more)
    return ExportReport(Path(folder), layout.model_class, layout.has_classifier, largest, truncation)


def _check_variant(method: Taught, variant: str | None) -> None:
    if variant is not None and not method.variants:
        raise OptionError("this learner has one kind of weights, so no variant can be chosen; drop variant")
    if variant is not None and variant not in method.variants:
        raise OptionError(f"there is no variant '{variant}'; {nearest(variant, method.variants)}")
