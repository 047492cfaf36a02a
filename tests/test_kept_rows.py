from __future__ import annotations

import numpy as np
import pytest

from everlora.errors import StoreError
from everlora.kept_rows import pack_rows, unpack_rows
from everlora.streams import Examples, load_dialogues

LABELS = np.array(["cat", "hund é"], dtype=object)
IDS = np.array([4, 2], dtype=np.int64)


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("modality", ["image", "text", "language"])
def test_rows_come_back_as_they_were(modality: str, labels: np.ndarray | None) -> None:
    inputs = {
        "image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        "text": ("a é", ""),
        "language": load_dialogues(["a é", "b"]).inputs,
    }[modality]
    examples = Examples(modality, inputs, labels, IDS)  # type: ignore[arg-type]
    again = unpack_rows(pack_rows(examples))
    assert again.modality == modality and again.fingerprint == examples.fingerprint
    assert again.ids.tolist() == [4, 2]
    assert (again.labels is None) == (labels is None)


@pytest.mark.parametrize("lost", ["ids", "labels.bytes", "labels.ends", "texts.bytes"])
def test_a_lost_array_is_noticed(lost: str) -> None:
    arrays = pack_rows(Examples("text", ("a", "b"), LABELS, IDS))
    del arrays[lost]
    with pytest.raises(StoreError, match=f"validation.safetensors has no array '{lost}'"):
        unpack_rows(arrays)
