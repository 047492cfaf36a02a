"""Rows that are longer than the model takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from everlora.backbones import Backbone
from everlora.doctor.coming import Part
from everlora.doctor.findings import Finding, broken, warning

__all__ = ["check_lengths", "encoder_silent"]

_ENCODER_LOG = "everlora.backbones"


def check_lengths(part: Part, backbone: Backbone) -> Iterator[Finding]:
    """Count rows that lose something, or all, when they are made tokens."""
    if part.rows.modality == "image":
        return
    with encoder_silent():
        encoded = backbone.encode(part.rows.inputs, part.rows.ids)
    total, cut = len(part.rows), int(encoded.num_truncated)
    most = backbone.inputs.max_length  # type: ignore[union-attr]  # images were left out above
    if cut:
        what = f"has {cut} of {total} rows ({cut / total:.1%}) longer than {most} tokens, which are cut"
        yield warning(part.name, what, "shorten them, or set max_length higher if the model takes more")
    dropped = int(getattr(encoded, "num_dropped", 0))
    if dropped:
        make = broken if dropped == total else warning
        what = f"has {dropped} of {total} rows in which nothing is left to learn from within {most} tokens"
        yield make(part.name, what, "shorten their prompts, or set max_length higher")


@contextmanager
def encoder_silent() -> Iterator[None]:
    """Keep to itself what the encoder logs of rows that are cut: findings say it."""
    logger = logging.getLogger(_ENCODER_LOG)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
