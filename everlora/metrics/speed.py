"""How fast a task is learned, from the accuracy on its validation rows before the first epoch and after each.

A curve is a sequence of `(accuracy, seconds)`: entry 0 stands before any training, entry `e` after epoch `e`, and
`seconds` counts the time spent training so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everlora.errors import DataError

__all__ = ["SHARE", "Arrival", "area_over_epochs", "arrival", "best_accuracy", "epochs_to_own_share"]

Curve = Sequence[Sequence[float]]

SHARE = 0.95
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Arrival:
    """When a curve first reached an accuracy.

    Attributes:
        epochs: the epoch, 0 for before training; one more than there are when it was not reached.
        seconds: training seconds up to there; when it was not reached, those of one more epoch of mean length.
        reached: whether it was.
    """

    epochs: int
    seconds: float
    reached: bool


def best_accuracy(curve: Curve) -> float:
    """Return the highest accuracy of a curve.

    Raises:
        DataError: the curve has no epoch.
    """
    _check(curve)
    return max(float(accuracy) for accuracy, _ in curve)


def arrival(curve: Curve, accuracy: float) -> Arrival:
    """Return when `curve` first reached `accuracy`.

    Args:
        curve: of one task.
        accuracy: what to reach, such as 95 % of the best that another network reached on this task.

    Raises:
        DataError: the curve has no epoch.
    """
    _check(curve)
    for epoch, (value, seconds) in enumerate(curve):
        if value >= accuracy - _ROUNDING:
            return Arrival(epoch, float(seconds), True)
    epochs = len(curve) - 1
    return Arrival(epochs + 1, float(curve[-1][1]) * (epochs + 1) / epochs, False)


def epochs_to_own_share(curve: Curve, share: float = SHARE) -> int:
    """Return the first epoch whose accuracy is `share` of the curve's own best.

    A low ceiling is reached early: the number says little without `arrival` at the best of another network.
    """
    return arrival(curve, share * best_accuracy(curve)).epochs


def area_over_epochs(curve: Curve) -> float:
    """Return the mean accuracy after the epochs, the one before training left out."""
    _check(curve)
    return sum(float(accuracy) for accuracy, _ in curve[1:]) / (len(curve) - 1)


def _check(curve: Curve) -> None:
    if len(curve) < 2:
        raise DataError(
            f"a curve needs the accuracy before training and after at least one epoch, found {len(curve)} numbers; "
            "train with validation rows"
        )
