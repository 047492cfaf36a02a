"""The accuracy matrix and every number computed from it, with NumPy only.

Rows are moments (after task 1, 2, ...), columns are the tasks' test sets. All numbers are fractions in [0, 1];
percent is the business of whoever prints them. A number that is not defined is `None` with a reason, never zero.
"""

from everlora.metrics.matrix import AccuracyMatrix
from everlora.metrics.printed import CAVEATS, PROJECTS, STANDING_WARNING
from everlora.metrics.seeds import PairedDifference, mean_and_deviation, paired_difference

__all__ = [
    "CAVEATS",
    "PROJECTS",
    "STANDING_WARNING",
    "AccuracyMatrix",
    "PairedDifference",
    "mean_and_deviation",
    "paired_difference",
]
