"""Generalised advantage estimation against hand values and the sum that defines it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.ops.advantages import gae

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

all_lengths = st.lists(st.integers(1, 8), min_size=1, max_size=4)
seeds = st.integers(0, 2**16)
shares = st.floats(0, 1)


def double(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def random_batch(lengths: list[int], extra: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask; the padding holds numbers like any other."""
    width = max(lengths) + extra
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), width, dtype=torch.float64, generator=generator)
    return rewards, values, mask_of(lengths, width)


def naive_gae(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """A_t = sum_l (gamma * lambda)^l * delta_{t+l}, for one response without padding."""
    end = len(rewards)
    values = [*values, 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(end)]
    return [
        math.fsum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, end))
        for t in range(end)
    ]


def test_gae_by_hand() -> None:
    # gamma 0.9, lambda 0.8, so gamma * lambda = 0.72.
    # delta_2 = 3 - 1.5 = 1.5             A_2 = 1.5
    # delta_1 = 2 + 0.9 * 1.5 - 1 = 2.35  A_1 = 2.35 + 0.72 * 1.5 = 3.43
    # delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4   A_0 = 1.4 + 0.72 * 3.43 = 3.8696
    advantages, returns = gae(
        double([[1, 2, 3]]), double([[0.5, 1, 1.5]]), mask_of([3], 3), 0.9, 0.8
    )
    assert advantages[0].tolist() == pytest.approx([3.8696, 3.43, 1.5], rel=1e-14)
    assert returns[0].tolist() == pytest.approx([4.3696, 4.43, 3.0], rel=1e-14)


def test_the_value_after_the_last_real_token_is_zero() -> None:
    # The response ends at t = 0: A_0 = 1 - 0.5, whatever the critic says of the padding.
    advantages, returns = gae(double([[1, 9]]), double([[0.5, 100]]), mask_of([1], 2), 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0]]
    assert returns.tolist() == [[1, 0]]


@given(all_lengths, st.integers(0, 2), seeds, shares, shares)
@repeatable
def test_gae_agrees_with_the_sum_that_defines_it(
    lengths: list[int], extra: int, seed: int, gamma: float, gae_lambda: float
) -> None:
    rewards, values, mask = random_batch(lengths, extra, seed)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row, end in enumerate(lengths):
        expected = naive_gae(
            rewards[row, :end].tolist(), values[row, :end].tolist(), gamma, gae_lambda
        )
        for t in range(end):
            assert abs(advantages[row, t].item() - expected[t]) < 1e-12
            assert abs(returns[row, t].item() - expected[t] - values[row, t].item()) < 1e-12
        assert not advantages[row, end:].any()
        assert not returns[row, end:].any()


@given(all_lengths, seeds, shares)
@repeatable
def test_lambda_zero_gives_the_td_error(lengths: list[int], seed: int, gamma: float) -> None:
    rewards, values, mask = random_batch(lengths, 1, seed)
    advantages, _ = gae(rewards, values, mask, gamma, 0.0)
    for row, end in enumerate(lengths):
        for t in range(end):
            after = values[row, t + 1].item() if t + 1 < end else 0.0
            td_error = rewards[row, t].item() + gamma * after - values[row, t].item()
            assert abs(advantages[row, t].item() - td_error) < 1e-12


@given(all_lengths, seeds)
@repeatable
def test_gamma_and_lambda_one_give_reward_to_go_minus_value(lengths: list[int], seed: int) -> None:
    rewards, values, mask = random_batch(lengths, 1, seed)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    for row, end in enumerate(lengths):
        for t in range(end):
            to_go = math.fsum(rewards[row, t:end].tolist())
            assert abs(advantages[row, t].item() - (to_go - values[row, t].item())) < 1e-12
            assert abs(returns[row, t].item() - to_go) < 1e-12


def test_lambda_one_gives_discounted_returns_that_no_value_biases() -> None:
    # gamma 0.5: 1 + 0.5 * 2 + 0.25 * 4 = 3; 2 + 0.5 * 4 = 4; 4.
    for values in ([0.0, 0.0, 0.0], [7.0, -3.0, 11.0]):
        _, returns = gae(double([[1, 2, 4]]), double([values]), mask_of([3], 3), 0.5, 1.0)
        assert returns[0].tolist() == pytest.approx([3, 4, 4], rel=1e-14)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_padding_has_no_effect(garbage: float) -> None:
    lengths = [3, 1, 5]
    rewards, values, mask = random_batch(lengths, 2, 0)
    advantages, returns = gae(
        rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, 0.99, 0.95
    )
    for row, end in enumerate(lengths):
        alone = slice(row, row + 1), slice(0, end)
        unpadded = gae(rewards[alone], values[alone], mask[alone], 0.99, 0.95)
        assert torch.equal(advantages[alone], unpadded[0])
        assert torch.equal(returns[alone], unpadded[1])
        assert not advantages[row, end:].any()
        assert not returns[row, end:].any()


def test_batch_order_has_no_effect() -> None:
    rewards, values, mask = random_batch([3, 1, 5], 0, 1)
    order = torch.tensor([2, 0, 1])
    shuffled = gae(rewards[order], values[order], mask[order], 0.9, 0.7)
    straight = gae(rewards, values, mask, 0.9, 0.7)
    assert torch.equal(shuffled[0], straight[0][order])
    assert torch.equal(shuffled[1], straight[1][order])


def test_a_perfect_critic_leaves_no_advantage() -> None:
    # V_t = 1 + 0.5 * V_{t+1}: 1.75, 1.5, 1.
    advantages, returns = gae(
        double([[1, 1, 1]]), double([[1.75, 1.5, 1]]), mask_of([3], 3), 0.5, 0.9
    )
    assert advantages.tolist() == [[0, 0, 0]]
    assert returns.tolist() == [[1.75, 1.5, 1]]


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\), \(1, 2\), \(1, 3\)"):
        gae(torch.zeros(1, 3), torch.zeros(1, 2), mask_of([3], 3), 1.0, 1.0)


def test_the_inputs_are_not_changed() -> None:
    rewards, values, mask = random_batch([2, 4], 1, 2)
    before = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, 0.9, 0.9)
    for tensor, copy in zip((rewards, values, mask), before, strict=True):
        assert torch.equal(tensor, copy)
