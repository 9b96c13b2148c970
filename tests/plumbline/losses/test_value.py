"""PPO's clipped value loss against hand values and a loop over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.losses.value import value_loss

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

EPS = 0.5


def double(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def random_batch(lengths: list[int], extra: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, old values and returns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(lengths), max(lengths) + extra)
    values, old_values, returns = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values, old_values, returns


def naive_value(
    values: list[list[float]],
    old_values: list[list[float]],
    returns: list[list[float]],
    lengths: list[int],
    eps: float,
) -> tuple[float, float]:
    """Half the sum of squared errors over the real tokens, and the clipped tokens."""
    loss = clipped = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            value, old, target = values[row][t], old_values[row][t], returns[row][t]
            bounded = min(max(value, old - eps), old + eps)
            loss += max((value - target) ** 2, (bounded - target) ** 2) / 2
            clipped += (bounded - target) ** 2 > (value - target) ** 2
    return loss, clipped


LENGTHS = [4, 1, 2]
MASK = mask_of(LENGTHS, 4)


def hand_case() -> tuple[Tensor, Tensor, Tensor]:
    """V, V_old and R of five tokens."""
    return (
        double([[2.0, 3.0, 1.25, 0.0, -2.0]]),
        double([[1.0, 1.0, 1.0, 1.0, 1.0]]),
        double([[3.0, 2.0, 1.0, -1.0, 0.75]]),
    )


def test_loss_and_statistics_by_hand() -> None:
    # V 2 clips to 1.5: (2 - 3)^2 = 1, (1.5 - 3)^2 = 2.25: clipped, 2.25
    # V 3 clips to 1.5: (3 - 2)^2 = 1, (1.5 - 2)^2 = 0.25: 1
    # V 1.25 is within 0.5 of 1: 0.25^2 = 0.0625
    # V 0 clips to 0.5: (0 + 1)^2 = 1, (0.5 + 1)^2 = 2.25: clipped, 2.25
    # V -2 clips to 0.5: (-2 - 0.75)^2 = 7.5625, 0.0625: 7.5625
    # 0.5 * (2.25 + 1 + 0.0625 + 2.25 + 7.5625) / 5 = 13.125 / 10 = 1.3125
    loss, stats = value_loss(*hand_case(), mask_of([5], 5), EPS, 5)
    assert loss.item() == pytest.approx(1.3125, rel=1e-14)
    assert stats.clip_fraction.item() == 2


def test_gradient_by_hand() -> None:
    # (V - R) / N where the loss is not clipped, 0 where it is.
    values, old_values, returns = hand_case()
    values.requires_grad_()
    loss, _ = value_loss(values, old_values, returns, mask_of([5], 5), EPS, 5)
    (gradient,) = torch.autograd.grad(loss, values)
    # 0, (3 - 2) / 5, (1.25 - 1) / 5, 0, (-2 - 0.75) / 5
    assert gradient[0].tolist() == pytest.approx([0, 0.2, 0.05, 0, -0.55], rel=1e-13)


def test_before_the_first_update_nothing_is_clipped() -> None:
    values, _, returns = random_batch(LENGTHS, 0, 0)
    loss, stats = value_loss(values, values.clone(), returns, MASK, EPS, 7)
    errors = [
        (values[row, t].item() - returns[row, t].item()) ** 2
        for row in range(3)
        for t in range(LENGTHS[row])
    ]
    assert loss.item() == pytest.approx(math.fsum(errors) / 14, rel=1e-13)
    assert stats.clip_fraction.item() == 0


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 2**16),
    st.floats(0.05, 2),
)
@repeatable
def test_loss_and_statistics_agree_with_a_loop(
    lengths: list[int], extra: int, seed: int, eps: float
) -> None:
    batch = random_batch(lengths, extra, seed)
    tokens = sum(lengths)
    loss, stats = value_loss(*batch, mask_of(lengths, max(lengths) + extra), eps, tokens)
    values, old_values, returns = (tensor.tolist() for tensor in batch)
    expected = naive_value(values, old_values, returns, lengths, eps)
    assert loss.item() == pytest.approx(expected[0] / tokens, rel=1e-11)
    assert stats.clip_fraction.item() == expected[1]


def test_a_wide_clip_range_gives_half_the_squared_error() -> None:
    values, old_values, returns = hand_case()
    # 0.5 * (1 + 1 + 0.0625 + 1 + 7.5625) / 5 = 1.0625
    loss, stats = value_loss(values, old_values, returns, mask_of([5], 5), 1e6, 5)
    assert loss.item() == pytest.approx(1.0625, rel=1e-9)
    assert stats.clip_fraction.item() == 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    # The rows hold 4, 1 and 2 tokens, so a mean of micro-batch means would be wrong.
    values, old_values, returns = random_batch(LENGTHS, 0, 2)
    values.requires_grad_()
    whole, whole_stats = value_loss(values, old_values, returns, MASK, EPS, 7)
    pieces = zip(
        *(torch.split(tensor, list(sizes)) for tensor in (values, old_values, returns, MASK)),
        strict=True,
    )
    parts = [value_loss(new, old, target, mask, EPS, 7) for new, old, target, mask in pieces]
    split = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(split, values)[0],
        torch.autograd.grad(whole, values)[0],
        rtol=1e-13,
        atol=0,
    )
    added = math.fsum(stats.clip_fraction.item() for _, stats in parts)
    assert added == whole_stats.clip_fraction.item()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["values", "old_values", "returns", "all"])
def test_masked_positions_have_no_effect(place: str, garbage: float) -> None:
    clean = dict(zip(("values", "old_values", "returns"), random_batch(LENGTHS, 0, 3), strict=True))
    planted = {
        name: tensor.masked_fill(~MASK, garbage) if place in (name, "all") else tensor.clone()
        for name, tensor in clean.items()
    }
    results = []
    for batch in (clean, planted):
        batch["values"].requires_grad_()
        loss, stats = value_loss(**batch, response_mask=MASK, cliprange=EPS, num_tokens=7)
        results.append((loss, stats, torch.autograd.grad(loss, batch["values"])[0]))
    (loss, stats, gradient), (planted_loss, planted_stats, planted_gradient) = results
    assert planted_loss.item() == loss.item()
    assert planted_stats.clip_fraction.item() == stats.clip_fraction.item()
    assert torch.equal(planted_gradient, gradient)
    assert planted_gradient[~MASK].tolist() == [0.0] * 5


def test_padding_and_batch_order_have_no_effect() -> None:
    batch = random_batch(LENGTHS, 0, 4)
    loss, stats = value_loss(*batch, MASK, EPS, 7)
    new, old, target = (torch.cat([tensor, torch.full_like(tensor, 9.0)], 1) for tensor in batch)
    padded, padded_stats = value_loss(new, old, target, mask_of(LENGTHS, 8), EPS, 7)
    order = torch.tensor([2, 0, 1])
    new, old, target = (tensor[order] for tensor in batch)
    shuffled, shuffled_stats = value_loss(new, old, target, MASK[order], EPS, 7)
    for other, other_stats in ((padded, padded_stats), (shuffled, shuffled_stats)):
        assert other.item() == pytest.approx(loss.item(), rel=1e-13)
        assert other_stats.clip_fraction.item() == stats.clip_fraction.item()


def test_gradcheck() -> None:
    values, old_values, returns = random_batch(LENGTHS, 0, 5)
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old_values, returns, MASK, EPS, 7)[0], values
    )


def test_statistics_carry_no_gradient() -> None:
    values, old_values, returns = hand_case()
    loss, stats = value_loss(values.requires_grad_(), old_values, returns, mask_of([5], 5), EPS, 5)
    assert loss.requires_grad
    assert not stats.clip_fraction.requires_grad
