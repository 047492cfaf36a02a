"""The rows of `long_streams.py`: which methods, with which options, learn which stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Row", "rows_of"]

RANK = 4
SHRINKING = {0: 4, 34: 3, 67: 2}
# so few directions of each task that a hundred of them find room, and a threshold that ends at 1 with the stream
INFLORA: dict[str, Any] = {"rank": RANK, "threshold_start": 0.9, "horizon": 100}


@dataclass(frozen=True)
class Row:
    """A method with its options.

    Attributes:
        label: how the row is called.
        method: the registered name.
        options: beside those of the stream.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


def _row(method: str, more: str = "", **options: Any) -> Row:
    return Row(f"{method} {more}".strip(), method, options)


_FIRST = (
    _row("sequential", rank=RANK),
    _row("inflora", **INFLORA),
    _row("inflora_opt", **INFLORA),
    _row("sd_lora", rank=RANK),
    _row("replay", rank=RANK),
    _row("ewc", rank=RANK),
    _row("lwf", rank=RANK),
    _row("o_lora", rank=RANK),
    _row("probe"),
)
_NCM = (_row("ncm", head="linear"),)
_SD_LORA = (_row("sd_lora_rr", rank_schedule=SHRINKING), _row("sd_lora_kd", rank=RANK))
_CAPPED = _row("sd_lora", "max_rank=40", rank=RANK, max_rank=40)
_PRESETS = tuple(_row("sd_lora", preset, rank=RANK, preset=preset) for preset in ("paper", "official", "libcontinual"))
_LINEAR = tuple(
    Row(f"{row.method} head=linear", row.method, {**row.options, "head": "linear"})
    for row in (*_FIRST, *_SD_LORA)
    if row.method != "replay"  # whose loss is over seen classes anyway
)

_ROWS: dict[str, tuple[Row, ...]] = {
    "clinc": (
        *_FIRST,
        *_NCM,
        *_SD_LORA,
        _row("probe", "head=ridge_random_features", head="ridge_random_features", head_features=500),
        _row("inflora", "head_drift=linear", **INFLORA, head_drift="linear"),
        _row("sequential", "head=linear loss=seen", rank=RANK, head="linear", loss="seen"),
        *_LINEAR,
    ),
    "cifar": (*_FIRST, *_NCM, *_SD_LORA),
    "revisits": (
        *_FIRST,
        _row("ncm"),
        *_SD_LORA,
        *_PRESETS,
        _CAPPED,
        _row("inflora", "alignment", **INFLORA, alignment=True, alignment_epochs=1),
        _row("o_lora", "orth_norm=fro2", rank=RANK, orth_norm="fro2"),
        _row("joint", rank=RANK),
    ),
    "domains": (*_FIRST, _row("ncm"), *_SD_LORA),
    "networks": (
        _row("independent"),
        _row("convlora"),
        _row("senacnn"),
        _row("packnet", schedule="equal", num_tasks=100),
        _row("pnn"),
        _row("sequential"),
        _row("replay"),
        _row("ewc"),
        _row("lwf"),
    ),
    "language": (
        _row("i_lora"),
        _row("i_lora", "llmcl_effective", preset="llmcl_effective"),
        _row("i_lora", "easycl", preset="easycl"),
        *(row for row in _FIRST if row.method != "probe"),
        *_SD_LORA,
    ),
}


def rows_of(stream: str) -> tuple[Row, ...]:
    """The rows of a stream, those that matter most first."""
    return _ROWS[stream]
