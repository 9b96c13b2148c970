"""DPO's loss against hand values and a plain sigmoid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.losses.dpo import dpo_loss

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

logprobs = st.floats(-60, 0)
pairs_of_logprobs = st.lists(
    st.tuples(logprobs, logprobs, logprobs, logprobs), min_size=1, max_size=6
)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_dpo(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, eps: float
) -> float:
    """Minus the expected log-probability of the label, which is wrong with probability eps."""
    # In ratios of probabilities, as the paper writes it, not in differences of logs.
    odds = math.exp(chosen - ref_chosen) ** beta / math.exp(rejected - ref_rejected) ** beta
    right = odds / (1 + odds)
    return -(1 - eps) * math.log(right) - eps * math.log(1 / (1 + odds))


def random_pairs(seed: int, count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = -10 * torch.rand(
        4, count, dtype=torch.float64, generator=generator
    )
    return chosen, rejected, ref_chosen, ref_rejected


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_before_training_the_loss_is_log_two_and_nothing_is_preferred(eps: float) -> None:
    chosen, rejected, _, _ = random_pairs(0)
    loss, stats = dpo_loss(chosen, rejected, chosen, rejected, 0.1, eps)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert [value.item() for value in stats] == [0, 0, 0, 0]


def test_loss_and_statistics_by_hand() -> None:
    # beta 0.5. Pair 1: rewards 0.5 * (-2 + 4) = 1 and 0.5 * (-3 + 3 - 2 log 3 + 2) = 1 - log 3, so
    # the margin is log 3 and costs log 4/3. Pair 2: rewards -1 and -1 + log 3; the margin is
    # -log 3 and costs log 4.
    chosen, ref_chosen = double(-2, -7), double(-4, -5)
    rejected = double(-1 - 2 * math.log(3), -9 + 2 * math.log(3))
    ref_rejected = double(-3, -7)
    loss, stats = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-13)
    assert stats.accuracy.item() == 1
    assert stats.margin.item() == pytest.approx(0, abs=1e-14)
    assert stats.chosen_reward.item() == pytest.approx(1 - 1, abs=1e-14)
    assert stats.rejected_reward.item() == pytest.approx(0, abs=1e-14)


def test_statistics_are_sums_with_the_sign_of_the_preference() -> None:
    # Rewards 0.1 * 3 and 0.1 * -2; 0.1 * 5 and 0.1 * 1.
    _, stats = dpo_loss(double(-1, -2), double(-6, -4), double(-4, -7), double(-4, -5), 0.1)
    assert stats.accuracy.item() == 2
    assert stats.chosen_reward.item() == pytest.approx(0.8, rel=1e-14)
    assert stats.rejected_reward.item() == pytest.approx(-0.1, rel=1e-13)
    assert stats.margin.item() == pytest.approx(0.9, rel=1e-14)


def test_smoothing_by_hand() -> None:
    # The margin is log 3: 0.8 * log 4/3 + 0.2 * log 4.
    loss, _ = dpo_loss(double(math.log(3)), double(0), double(0), double(0), 1.0, 0.2)
    expected = 0.8 * math.log(4 / 3) + 0.2 * math.log(4)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_smoothing_is_least_where_the_odds_are_those_of_a_right_label() -> None:
    # sigmoid(log 4) = 0.8 = 1 - eps, where the gradient is 0.
    chosen = double(math.log(4)).requires_grad_()
    loss, _ = dpo_loss(chosen, double(0), double(0), double(0), 1.0, 0.2)
    assert torch.autograd.grad(loss, chosen)[0].item() == pytest.approx(0, abs=1e-15)


@given(pairs_of_logprobs, st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([0.0, 0.1, 0.4]))
@repeatable
def test_loss_agrees_with_a_plain_sigmoid(
    pairs: list[tuple[float, float, float, float]], beta: float, eps: float
) -> None:
    terms = [naive_dpo(*pair, beta, eps) for pair in pairs]
    columns = [double(*column) for column in zip(*pairs, strict=True)]
    loss, stats = dpo_loss(*columns, beta, eps)
    assert loss.item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-9, abs=1e-12)
    rewards = [(beta * (c - rc), beta * (r - rr)) for c, r, rc, rr in pairs]
    assert stats.chosen_reward.item() == pytest.approx(math.fsum(c for c, _ in rewards), abs=1e-10)
    assert stats.rejected_reward.item() == pytest.approx(
        math.fsum(r for _, r in rewards), abs=1e-10
    )
    assert stats.margin.item() == pytest.approx(math.fsum(c - r for c, r in rewards), abs=1e-10)


def test_gradient_by_hand() -> None:
    # -beta * sigmoid(-h) / B for the chosen, its opposite for the rejected (the paper's gradient);
    # beta 2, h = log 3 and 0, B = 2: -2 * 1/4 / 2 and -2 * 1/2 / 2.
    chosen = double(math.log(3) / 2, 0).requires_grad_()
    rejected = double(0, 0).requires_grad_()
    loss, _ = dpo_loss(chosen, rejected, double(0, 0), double(0, 0), 2.0)
    for_chosen, for_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert for_chosen.tolist() == pytest.approx([-1 / 4, -1 / 2], rel=1e-14)
    assert for_rejected.tolist() == pytest.approx([1 / 4, 1 / 2], rel=1e-14)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_gradcheck(eps: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(1)
    assert torch.autograd.gradcheck(
        lambda c, r: dpo_loss(c, r, ref_chosen, ref_rejected, 0.3, eps)[0],
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


@pytest.mark.parametrize(("difference", "expected"), [(-1000.0, 1000.0), (1000.0, 0.0)])
def test_far_apart_log_probabilities_do_not_overflow(difference: float, expected: float) -> None:
    chosen = double(difference).requires_grad_()
    loss, _ = dpo_loss(chosen, double(0), double(0), double(0), 1.0)
    assert loss.item() == expected
    assert torch.autograd.grad(loss, chosen)[0].isfinite().all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_micro_batches_in_any_order_add_up_to_the_whole(order: tuple[int, ...]) -> None:
    pairs = random_pairs(2)
    pairs[0].requires_grad_()
    whole, whole_stats = dpo_loss(*pairs, 0.3, 0.1)
    mixed = [column[list(order)] for column in pairs]
    parts = [
        dpo_loss(*(column[piece] for column in mixed), 0.3, 0.1, num_pairs=count)
        for piece, count in ((slice(0, 1), 3), (slice(1, 3), torch.tensor(3)))
    ]
    split = parts[0][0] + parts[1][0]
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(split, pairs[0])[0],
        torch.autograd.grad(whole, pairs[0])[0],
        rtol=1e-13,
        atol=0,
    )
    for i, total in enumerate(whole_stats):
        added = math.fsum(stats[i].item() for _, stats in parts)
        assert added == pytest.approx(total.item(), rel=1e-13)


def test_statistics_carry_no_gradient() -> None:
    chosen, *rest = random_pairs(3)
    _, stats = dpo_loss(chosen.requires_grad_(), *rest, beta=0.1)
    assert not any(value.requires_grad for value in stats)
