"""Advantages and returns against hand values and the sums that define them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.ops.advantages import discounted_returns, gae, leave_one_out, standardise_groups

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


# Discounted returns


def test_discounted_returns_by_hand() -> None:
    # gamma 0.5: 1 + 0.5 * 2 + 0.25 * 4 = 3; 2 + 0.5 * 4 = 4; 4. The second response ends early.
    rewards = double([[1, 2, 4], [6, -2, 0]])
    returns = discounted_returns(rewards, mask_of([3, 2], 3), 0.5)
    assert returns.tolist() == [[3, 4, 4], [5, -2, 0]]


@given(all_lengths, st.integers(0, 2), seeds, shares)
@repeatable
def test_discounted_returns_agree_with_the_sum_that_defines_them(
    lengths: list[int], extra: int, seed: int, gamma: float
) -> None:
    rewards, _, mask = random_batch(lengths, extra, seed)
    returns = discounted_returns(rewards, mask, gamma)
    for row, end in enumerate(lengths):
        for t in range(end):
            to_go = math.fsum(gamma ** (s - t) * rewards[row, s].item() for s in range(t, end))
            assert abs(returns[row, t].item() - to_go) < 1e-12
        assert not returns[row, end:].any()


def test_without_a_discount_a_return_is_the_sum_and_with_all_of_it_the_reward() -> None:
    rewards, mask = double([[1, 2, 4]]), mask_of([3], 3)
    assert discounted_returns(rewards, mask, 1.0).tolist() == [[7, 6, 4]]
    assert discounted_returns(rewards, mask, 0.0).tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_padding_has_no_effect_on_returns(garbage: float) -> None:
    rewards, _, mask = random_batch([3, 1, 5], 2, 4)
    clean = discounted_returns(rewards, mask, 0.9)
    dirty = discounted_returns(rewards.masked_fill(~mask, garbage), mask, 0.9)
    assert torch.equal(clean, dirty)
    assert not clean[~mask].any()


# Groups of responses to one prompt


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_leave_one_out_by_hand() -> None:
    # 1 - (2 + 6) / 2 = -3; 2 - 3.5 = -1.5; 6 - 1.5 = 4.5; and -4, 0, 4 less -4, 0, 4 over -2.
    advantages = leave_one_out(numbers([1, 2, 6, -4, 0, 4]), 3)
    assert advantages.tolist() == [-3, -1.5, 4.5, -6, 0, 6]


def test_with_two_responses_leave_one_out_is_their_difference() -> None:
    assert leave_one_out(numbers([3, 1, 5, 5]), 2).tolist() == [2, -2, 0, 0]


group_sizes = st.integers(2, 6)


@given(group_sizes, st.integers(1, 4), seeds)
@repeatable
def test_leave_one_out_agrees_with_a_loop(size: int, prompts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(prompts * size, dtype=torch.float64, generator=generator)
    advantages = leave_one_out(returns, size)
    for i, own in enumerate(returns.tolist()):
        first = i // size * size
        others = [returns[j].item() for j in range(first, first + size) if j != i]
        assert advantages[i].item() == pytest.approx(own - sum(others) / (size - 1), abs=1e-12)


def test_standardised_groups_by_hand() -> None:
    # Mean 3, variance ((1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2) / 2 = 7; the next group lies 100 higher.
    advantages = standardise_groups(numbers([1, 2, 6, 101, 102, 106]), 3)
    scale = math.sqrt(7) + 1e-4
    assert advantages.tolist() == pytest.approx([-2 / scale, -1 / scale, 3 / scale] * 2, rel=1e-12)


@given(group_sizes, st.integers(1, 4), seeds)
@repeatable
def test_standardised_groups_agree_with_a_loop(size: int, prompts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(prompts * size, dtype=torch.float64, generator=generator)
    advantages = standardise_groups(returns, size)
    for i, own in enumerate(returns.tolist()):
        group = returns[i // size * size :][:size].tolist()
        mean = math.fsum(group) / size
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in group) / (size - 1))
        assert advantages[i].item() == pytest.approx((own - mean) / (std + 1e-4), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_equal_returns_give_exactly_zero(value: float, dtype: torch.dtype, size: int) -> None:
    # Six times 0.1 does not add up to 0.6: the mean is not the number itself.
    returns = torch.full((2 * size,), value, dtype=dtype)
    returns[size:] = torch.arange(size)
    advantages = standardise_groups(returns, size)
    assert advantages[:size].tolist() == [0.0] * size
    assert advantages[size:].abs().max() > 0.5


@pytest.mark.parametrize("compare", [leave_one_out, standardise_groups])
@pytest.mark.parametrize(("responses", "size"), [(6, 4), (5, 2), (3, 1), (4, 0), (2, 4)])
def test_groups_that_do_not_divide_the_responses_are_refused(
    compare: Any, responses: int, size: int
) -> None:
    with pytest.raises(ValueError, match=rf"at least 2 that divide .* got {size} for {responses}"):
        compare(torch.zeros(responses), size)


@pytest.mark.parametrize("compare", [leave_one_out, standardise_groups])
def test_a_constant_on_all_returns_of_a_prompt_changes_nothing(compare: Any) -> None:
    returns = numbers([1, 2, 6, 4, -4, 0])
    shifted = returns + numbers([10, 10, 10, -5, -5, -5])
    assert compare(shifted, 3).tolist() == pytest.approx(compare(returns, 3).tolist(), abs=1e-12)
