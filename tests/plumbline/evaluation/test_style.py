"""What the figures share."""

import math

import pytest

from plumbline.evaluation.style import column, smooth


def test_smoothing_by_hand() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    assert smooth([1.0, 2.0], weight=0.0) == [1, 2]
    # (0.5 * 0.5 * 1 + 0.5 * 2) / 0.75.
    assert smooth([1.0, 2.0], weight=0.5) == pytest.approx([1, 5 / 3])
    assert smooth([]) == []
    assert not any(math.isnan(value) for value in smooth([1.0] * 100))


def test_columns_have_the_rows_that_have_all_of_them() -> None:
    history = [
        {"step": 1.0, "loss": 5.0},
        {"step": 2.0},
        {"step": 3.0, "loss": math.nan},
        {"step": 4.0, "loss": 2.0},
    ]
    assert column(history, "step", "loss") == [[1, 4], [5, 2]]
    assert column(history, "step", "nothing") == [[], []]
    assert column([], "step") == [[]]
