"""Masked sums, means, variances and whitening, against hand values and the standard library."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.ops.masked import masked_mean, masked_sum, masked_var, whiten

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

GARBAGE = [math.nan, math.inf, -math.inf, 1e300]


@st.composite
def batches(draw: st.DrawFn, least: int) -> tuple[Tensor, Tensor]:
    """A float64 batch with any mask of at least `least` real entries."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    size = rows * columns
    numbers = st.floats(-100, 100, allow_nan=False)
    x = draw(st.lists(numbers, min_size=size, max_size=size))
    kept = draw(st.sets(st.integers(0, size - 1), min_size=least, max_size=size))
    mask = [i in kept for i in range(size)]
    return (
        torch.tensor(x, dtype=torch.float64).view(rows, columns),
        torch.tensor(mask).view(rows, columns),
    )


def kept_values(x: Tensor, mask: Tensor) -> list[float]:
    """The real entries in reading order."""
    pairs = zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return [value for value, keep in pairs if keep]


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_sum_counts_only_real_entries(garbage: float) -> None:
    x = double([1, 2, garbage], [4, garbage, garbage])
    assert masked_sum(x, MASK).item() == 7  # 1 + 2 + 4
    assert masked_sum(x, MASK, 1).tolist() == [3, 4]
    assert masked_sum(x, MASK, 0).tolist() == [5, 2, 0]


def test_sum_over_no_entry_is_zero() -> None:
    assert masked_sum(double([math.nan]), torch.tensor([[False]])).item() == 0


@pytest.mark.parametrize("garbage", GARBAGE)
def test_mean_divides_by_the_real_entries(garbage: float) -> None:
    x = double([1, 2, garbage], [6, garbage, garbage])
    assert masked_mean(x, MASK).item() == 3  # (1 + 2 + 6) / 3, not / 6


def test_mean_is_over_entries_and_not_a_mean_of_row_means() -> None:
    # The mean of row means is ((1 + 3) / 2 + 8) / 2 = 5.
    assert masked_mean(double([1, 3, 0], [8, 0, 0]), MASK).item() == 4


@pytest.mark.parametrize("garbage", GARBAGE)
def test_variance_is_unbiased(garbage: float) -> None:
    # mean (1 + 2 + 6) / 3 = 3; squares 4 + 1 + 9 = 14; 14 / (3 - 1) = 7.
    x = double([1, 2, garbage], [6, garbage, garbage])
    assert masked_var(x, MASK).item() == pytest.approx(7, rel=1e-15)


def test_too_few_entries_are_refused() -> None:
    x = double([1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        masked_mean(x, torch.tensor([[False, False]]))
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        masked_var(x, torch.tensor([[True, False]]))


@given(batches(least=2))
@repeatable
def test_sum_mean_and_variance_agree_with_the_standard_library(
    batch: tuple[Tensor, Tensor],
) -> None:
    x, mask = batch
    kept = kept_values(x, mask)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(kept), rel=1e-12, abs=1e-11)
    assert masked_mean(x, mask).item() == pytest.approx(
        statistics.fmean(kept), rel=1e-12, abs=1e-11
    )
    assert masked_var(x, mask).item() == pytest.approx(
        statistics.variance(kept), rel=1e-9, abs=1e-11
    )


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_by_hand(garbage: float, shift_mean: bool) -> None:
    # 0, 4, 8: mean 4, variance (16 + 0 + 16) / 2 = 16, so (x - 4) / sqrt(16 + eps);
    # eps = 9 gives sqrt(25) = 5: -0.8, 0, 0.8. Without the shift the mean, 4, comes back.
    x = double([0, 4, garbage], [8, garbage, garbage])
    mean = 0.0 if shift_mean else 4.0
    got = whiten(x, MASK, shift_mean=shift_mean, eps=9.0)
    expected = double([mean - 0.8, mean, 0], [mean + 0.8, 0, 0])
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert got[~MASK].tolist() == [0, 0, 0]


def test_whitening_shifts_the_mean_unless_told_otherwise() -> None:
    x = double([0, 4, 0], [8, 0, 0])
    assert torch.equal(whiten(x, MASK), whiten(x, MASK, shift_mean=True))
    # The default eps is far below a variance of 16.
    assert kept_values(whiten(x, MASK), MASK) == pytest.approx([-1, 0, 1], rel=1e-8)


@given(batches(least=2))
@repeatable
def test_whitening_agrees_with_the_standard_library(batch: tuple[Tensor, Tensor]) -> None:
    x, mask = batch
    kept = kept_values(x, mask)
    mean = statistics.fmean(kept)
    scale = math.sqrt(statistics.variance(kept) + 0.25)
    shifted = whiten(x, mask, shift_mean=True, eps=0.25)
    kept_mean = whiten(x, mask, shift_mean=False, eps=0.25)
    for got, offset in ((shifted, 0.0), (kept_mean, mean)):
        expected = [(value - mean) / scale + offset for value in kept]
        assert kept_values(got, mask) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert not got[~mask].any()


def test_whitening_keeps_the_mean_and_gives_variance_one() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mask = torch.arange(7) < torch.tensor([[7], [1], [3], [5], [2]])
    before = statistics.fmean(kept_values(x, mask))
    for shift_mean, mean in ((True, 0.0), (False, before)):
        after = kept_values(whiten(x, mask, shift_mean=shift_mean), mask)
        assert statistics.fmean(after) == pytest.approx(mean, abs=1e-12)
        assert statistics.variance(after) == pytest.approx(1, rel=1e-8)


def test_whitening_equal_entries_gives_no_nan() -> None:
    x = double([3, 3, 0], [3, 0, 0])
    assert whiten(x, MASK).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert whiten(x, MASK, shift_mean=False).tolist() == [[3, 3, 0], [3, 0, 0]]


def test_whitening_ignores_padding_and_batch_order() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    alone = whiten(x, mask)
    padded = whiten(
        torch.cat([x, torch.full((3, 2), math.nan, dtype=torch.float64)], 1),
        torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(padded[:, :4], alone, rtol=1e-13, atol=1e-13)
    assert not padded[:, 4:].any()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(whiten(x[order], mask[order]), alone[order], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, whiten])
def test_masked_entries_get_exactly_zero_gradient(
    function: Callable[[Tensor, Tensor], Tensor], garbage: float
) -> None:
    x = double([1, 2, garbage], [6, garbage, garbage]).requires_grad_()
    weights = double([1, -2, 5], [3, 7, 11])
    (got,) = torch.autograd.grad((function(x, MASK) * weights).sum(), x)
    clean = double([1, 2, 0], [6, 0, 0]).requires_grad_()
    (expected,) = torch.autograd.grad((function(clean, MASK) * weights).sum(), clean)
    assert got[~MASK].tolist() == [0, 0, 0]
    torch.testing.assert_close(got[MASK], expected[MASK], rtol=1e-14, atol=1e-14)
