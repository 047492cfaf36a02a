"""Texts that the pretrained model writes itself: sampled once for a folder of runs and kept there, or to learn from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from everlora.backbones import model_fingerprint
from everlora.backbones.tokens import EncodedTokens
from everlora.experiments.schema import RetentionSpec
from everlora.experiments.traces import fresh_backbone
from everlora.language import retention_rows
from everlora.language.passes import language_model
from everlora.learner import Learner
from everlora.store.files import dump_arrays, load_arrays, read_bytes, replace_file
from everlora.streams import Examples, load_dialogues

__all__ = ["own_texts", "retention_set"]

logger = logging.getLogger("everlora.experiments")

_BATCH = 64
_LONGEST = 256
_REHEARSED = 1_000_003


def retention_set(learner: Learner, spec: RetentionSpec, folder: Path) -> EncodedTokens:
    """Return texts sampled from the pretrained model, the same for all rows and seeds of a folder.

    Which tokens are drawn can depend on the processor, so the texts are kept in the folder and read from there, also
    by a run that goes on later.

    Args:
        learner: says which pretrained model.
        spec: how many texts, how long, and the seed.
        folder: of the experiment.

    Raises:
        StoreError: the file in the folder is damaged.
    """
    facts = [model_fingerprint(learner.backbone.folder), spec.samples, spec.max_tokens, spec.seed]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    path = folder / f"retention-{digest}.safetensors"
    if not path.exists():
        logger.info("the pretrained model writes %d texts of up to %d tokens", spec.samples, spec.max_tokens)
        rows = retention_rows(
            fresh_backbone(learner), count=spec.samples, max_tokens=spec.max_tokens, seed=spec.seed, batch_size=_BATCH
        )
        # Two processes may get here at once: they draw the same tokens, and the file is there whole or not at all.
        replace_file(path, dump_arrays(rows.arrays(), path.name))
    return EncodedTokens.from_arrays(load_arrays(read_bytes(path), path))


def own_texts(learner: Learner, count: int, folder: Path) -> Examples:
    """Return texts of the pretrained model to rehearse, other draws than any recipe's tests.

    Args:
        learner: says which pretrained model.
        count: how many texts.
        folder: of the experiment.
    """
    longest = min(_LONGEST, learner.backbone.max_length or _LONGEST)
    rows = retention_set(learner, RetentionSpec(samples=count, max_tokens=longest, seed=_REHEARSED), folder)
    texts = [language_model(learner.backbone).inputs.decode(rows.row(row)) for row in range(len(rows))]
    return load_dialogues([text for text in texts if text.strip()])
