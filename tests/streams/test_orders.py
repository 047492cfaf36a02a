from __future__ import annotations

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.streams import class_order


@pytest.mark.parametrize(
    ("seed", "num_classes", "first"),
    [
        (1993, 100, [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]),
        (1993, 200, [168, 136, 51, 9, 183, 101, 171, 99, 42, 159]),
        (0, 100, [26, 86, 2, 55, 75, 93, 16, 73, 54, 95]),
        (1, 100, [80, 84, 33, 81, 93, 17, 36, 82, 69, 65]),
        (2, 100, [83, 30, 56, 24, 16, 23, 2, 27, 28, 13]),
    ],
)
def test_published_orders(seed: int, num_classes: int, first: list[int]) -> None:
    order = class_order(num_classes, seed)
    assert order[:10].tolist() == first
    assert sorted(order.tolist()) == list(range(num_classes))


def test_natural_order_and_global_state() -> None:
    assert class_order(4, None).tolist() == [0, 1, 2, 3]
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    class_order(100, 1993)
    assert np.random.rand() == expected


@pytest.mark.parametrize(("num_classes", "seed"), [(0, 1), (3, -1), (3, 2**32)])
def test_refused(num_classes: int, seed: int) -> None:
    with pytest.raises(DataError):
        class_order(num_classes, seed)
