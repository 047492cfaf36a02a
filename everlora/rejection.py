"""Answering *none of these*: how sure a prediction is, and the threshold below which it is refused.

The confidence of a row is the height of its best score above the mean of the scores that compete, over the root of
their variance in that row plus `FLOOR` times their mean variance in rows of known classes. It does not change when
scores are shifted or scaled, so that it means the same for trained heads and for those of statistics, and as classes
are added; the floor keeps it from being the same for all rows where two classes compete. `benchmarks/none_of_these.py`
compares it with others on classes that were held out, by their validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everlora.errors import DataError, OptionError

if TYPE_CHECKING:
    from everlora.scenarios import Scenario
    from everlora.store import LearnerStore
    from everlora.streams import Examples
    from everlora.training import TaskTrainer

__all__ = ["FLOOR", "KnownRows", "Rejection", "Rejects", "confidence", "spread"]

FLOOR = 0.3
"""How much of the usual variance of a row's scores is added to its own."""

_LEAST_BELOW = 5  # rows below a threshold; with fewer the share that it refuses is mostly chance


def spread(scores: Tensor) -> float:
    """Mean, over rows, of the variance of the scores that compete; 0 where fewer than two do.

    Args:
        scores: `(n, classes)`, `-inf` for classes that do not compete.
    """
    several = torch.isfinite(scores).sum(dim=1) > 1
    return float(_moments(scores[several])[1].mean()) if bool(several.any()) else 0.0


def confidence(scores: Tensor, usual: float) -> NDArray[np.float64]:
    """How sure each row's best class is.

    Args:
        scores: `(n, classes)`, `-inf` for classes that do not compete.
        usual: `spread` of rows of known classes.

    Returns:
        `(n,)`: `(max - mean) / sqrt(variance + FLOOR * usual)`; the score itself where a single class competes.
    """
    mean, variance = _moments(scores)
    best = scores.double().max(dim=1).values
    height = (best - mean) / (variance + FLOOR * usual).clamp(min=1e-300).sqrt()
    alone = torch.isfinite(scores).sum(dim=1) == 1
    return np.asarray(torch.where(alone, best, height).cpu().numpy())


def _moments(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores that compete in each row, `(n,)` float64."""
    competes = torch.isfinite(scores)
    number = competes.sum(dim=1).clamp(min=1)
    values = scores.double().masked_fill(~competes, 0.0)
    mean = values.sum(dim=1) / number
    deviations = (values - mean[:, None]).masked_fill(~competes, 0.0)
    return mean, deviations.square().sum(dim=1) / number


@dataclass(frozen=True)
class Rejection:
    """A rule for which rows are of none of the known classes.

    Attributes:
        least: the confidence below which a row is refused.
        usual: `spread` of rows of known classes.
    """

    least: float
    usual: float

    def refuses(self, scores: Tensor) -> list[bool]:
        """Whether each row of `(n, classes)` scores is refused."""
        return [bool(low) for low in confidence(scores, self.usual) < self.least]


@dataclass(frozen=True, eq=False)
class KnownRows:
    """What the present model says of validation rows of classes it knows.

    Attributes:
        confidences: `(n,)` float64.
        usual: `spread` of their scores.
    """

    confidences: NDArray[np.float64]
    usual: float

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> KnownRows:
        """Take account of rows by their scores, a sequence of `(n, classes)`."""
        if not parts:
            return cls(np.empty(0), 0.0)
        scores = torch.cat(list(parts))
        usual = spread(scores)
        return cls(confidence(scores, usual), usual)

    def rejection(self, share: float) -> Rejection:
        """The rule that refuses this share of these rows.

        Raises:
            DataError: they are too few to tell.
        """
        found, needed = len(self.confidences), math.ceil(_LEAST_BELOW / share - 1e-9)
        if found < needed:
            raise DataError(
                f"none_of_these={share:g} needs {needed} validation rows or more, so that {_LEAST_BELOW} of them lie "
                f"below the threshold, found {found}; learn with a larger keep_validation, or give a larger share."
            )
        return Rejection(float(np.quantile(self.confidences, share)), self.usual)


class Rejects:
    """The part of a learner that answers *none of these*."""

    path: Path
    _rules: Scenario[Any, Any]
    _store: LearnerStore
    # Of one store object, which every task learned, forgotten or rolled back replaces.
    _known: tuple[LearnerStore, dict[tuple[str | None, int | None], KnownRows]] | None = None

    def _rejection(
        self, share: float | None, trainer: TaskTrainer, task: int | None, variant: str | None
    ) -> Rejection | None:
        """The rule by which `predict` refuses; None for none. To be called with the weights that predict in place.

        Raises:
            OptionError: the share is not one, or answers are written and not chosen.
            DataError: no validation rows are kept, or too few.
        """
        if share is None:
            return None
        if not 0.0 < share < 1.0:
            raise OptionError(
                f"none_of_these is the share of known rows that may be refused, between 0 and 1, found {share:g}; give "
                "a share such as 0.05."
            )
        if self._known is None or self._known[0] is not self._store:
            self._known = (self._store, {})
        known = self._known[1]
        if (variant, task) not in known:
            indices = range(len(self._store.tasks)) if task is None else (task,)
            rows = {index: kept for index in indices if (kept := self._kept_rows(index)) is not None and len(kept)}
            scores = self._rules.scores_of_known(trainer, rows, task)
            if not rows:
                raise DataError(
                    f"{self.path} keeps no validation rows{'' if task is None else ' of this task'} to take the "
                    "threshold of none_of_these from; make the learner with keep_validation=20, or give learn a "
                    "validation set."
                )
            known[variant, task] = KnownRows.of(scores)
        return known[variant, task].rejection(share)

    def _kept_rows(self, index: int) -> Examples | None:
        raise NotImplementedError
