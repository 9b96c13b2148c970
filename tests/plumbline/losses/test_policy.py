"""PPO's clipped policy loss against hand values and a loop over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.losses.policy import policy_loss

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

EPS = 0.2


def double(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def random_batch(lengths: list[int], extra: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones about 0.3 nats off, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(lengths), max(lengths) + extra)
    noise, drift, advantages = torch.randn(shape, dtype=torch.float64, generator=generator)
    logprobs = -noise.abs()
    return logprobs, logprobs - 0.3 * drift, advantages


def naive_policy(
    logprobs: list[list[float]],
    old_logprobs: list[list[float]],
    advantages: list[list[float]],
    lengths: list[int],
    eps: float,
    eps_high: float,
) -> tuple[float, float, float, float, float]:
    """Sums over the real tokens of loss, (log ratio)^2 / 2, clipped and ratio; largest ratio."""
    largest = -math.inf
    loss = approx_kl = clipped = ratios = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            log_ratio = logprobs[row][t] - old_logprobs[row][t]
            ratio = math.exp(log_ratio)
            advantage = advantages[row][t]
            objective = advantage * ratio
            bounded = advantage * min(max(ratio, 1 - eps), 1 + eps_high)
            loss -= min(objective, bounded)
            approx_kl += log_ratio**2 / 2
            clipped += bounded < objective
            ratios += ratio
            largest = max(largest, ratio)
    return loss, approx_kl, clipped, ratios, largest


LENGTHS = [4, 1, 2]
MASK = mask_of(LENGTHS, 4)


def hand_case() -> tuple[Tensor, Tensor, Tensor]:
    """Ratios 1.5, 1.5, 0.5, 0.5 and advantages 2, -2, 2, -2."""
    old = double([[-1.0, -2.0, -1.5, -0.7]])
    logprobs = old + double([[math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]])
    return logprobs, old, double([[2, -2, 2, -2]])


def test_loss_and_statistics_by_hand() -> None:
    # A = 2, ratio 1.5: max(-3, -2 * 1.2) = -2.4, clipped
    # A = -2, ratio 1.5: max(3, 2.4) = 3
    # A = 2, ratio 0.5: max(-1, -2 * 0.8) = -1
    # A = -2, ratio 0.5: max(1, 1.6) = 1.6, clipped
    # (-2.4 + 3 - 1 + 1.6) / 4 = 0.3
    logprobs, old, advantages = hand_case()
    loss, stats = policy_loss(logprobs, old, advantages, mask_of([4], 4), EPS, 4)
    assert loss.item() == pytest.approx(0.3, rel=1e-13)
    assert stats.clip_fraction.item() == 2
    assert stats.ratio.item() == pytest.approx(4.0, rel=1e-14)  # 1.5 + 1.5 + 0.5 + 0.5
    assert stats.ratio_max.item() == pytest.approx(1.5, rel=1e-14)
    # 2 * log(1.5)^2 / 2 + 2 * log(0.5)^2 / 2
    expected = math.log(1.5) ** 2 + math.log(0.5) ** 2
    assert stats.approx_kl.item() == pytest.approx(expected, rel=1e-13)


def test_clip_higher_leaves_likelier_tokens_more_room() -> None:
    # Upwards to 1.4: A = 2, ratio 1.5 gives -2.8 in place of -2.4, and ratio 1.3 is not clipped.
    # Downwards 0.8 stays: A = -2, ratio 0.5 gives 1.6, clipped; A = 2 gives -1.
    old = double([[-1.0, -2.0, -1.5, -0.7]])
    logprobs = old + double([[math.log(ratio) for ratio in (1.5, 1.3, 0.5, 0.5)]])
    logprobs.requires_grad_()
    advantages = double([[2, 2, -2, 2]])
    loss, stats = policy_loss(logprobs, old, advantages, mask_of([4], 4), EPS, 4, 0.4)
    assert loss.item() == pytest.approx((-2.8 - 2.6 + 1.6 - 1) / 4, rel=1e-13)
    assert stats.clip_fraction.item() == 2
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0, -0.65, 0, -0.25], rel=1e-13)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_largest_ratio_is_that_of_a_real_token(order: tuple[int, ...]) -> None:
    ratios = torch.tensor([[1.5, 9.0, 9.0], [0.5, 2.5, 9.0], [0.25, 0.125, 2.0]]).double()
    mask = mask_of([1, 2, 3], 3)
    rows = list(order)
    _, stats = policy_loss(
        ratios.log()[rows], torch.zeros(3, 3), torch.ones(3, 3), mask[rows], EPS, 6
    )
    assert stats.ratio_max.item() == pytest.approx(2.5, rel=1e-13)
    # All ratios below 1, and the padding's would be 1.
    _, stats = policy_loss(
        ratios.log()[2:], torch.zeros(1, 3), torch.ones(1, 3), mask_of([2], 3), EPS, 2
    )
    assert stats.ratio_max.item() == pytest.approx(0.25, rel=1e-13)


def test_gradient_by_hand() -> None:
    # -A * ratio / N where the loss is not clipped, 0 where it is: 0, 2 * 1.5 / 4, -2 * 0.5 / 4, 0.
    logprobs, old, advantages = hand_case()
    logprobs.requires_grad_()
    loss, _ = policy_loss(logprobs, old, advantages, mask_of([4], 4), EPS, 4)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0, 0.75, -0.25, 0], rel=1e-13)


def test_before_the_first_update_nothing_is_clipped() -> None:
    logprobs, _, advantages = random_batch(LENGTHS, 0, 0)
    logprobs.requires_grad_()
    loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages, MASK, EPS, 7)
    assert stats.ratio.item() == 7
    assert stats.approx_kl.item() == 0
    assert stats.clip_fraction.item() == 0
    # Ratio 1: the loss is -mean A, its gradient the plain policy gradient -A / N.
    real = [advantages[row, t].item() for row in range(3) for t in range(LENGTHS[row])]
    assert loss.item() == pytest.approx(-math.fsum(real) / 7, rel=1e-13)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(
        gradient, torch.where(MASK, -advantages / 7, 0.0), rtol=1e-13, atol=0
    )


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 2**16),
    st.floats(0.05, 0.5),
    st.none() | st.floats(0.05, 0.9),
)
@repeatable
def test_loss_and_statistics_agree_with_a_loop(
    lengths: list[int], extra: int, seed: int, eps: float, eps_high: float | None
) -> None:
    batch = random_batch(lengths, extra, seed)
    tokens = sum(lengths)
    mask = mask_of(lengths, max(lengths) + extra)
    loss, stats = policy_loss(*batch, mask, eps, tokens, eps_high)
    logprobs, old, advantages = (tensor.tolist() for tensor in batch)
    high = eps if eps_high is None else eps_high
    expected = naive_policy(logprobs, old, advantages, lengths, eps, high)
    assert loss.item() == pytest.approx(expected[0] / tokens, rel=1e-11, abs=1e-13)
    assert stats.approx_kl.item() == pytest.approx(expected[1], rel=1e-11)
    assert stats.clip_fraction.item() == expected[2]
    assert stats.ratio.item() == pytest.approx(expected[3], rel=1e-11)
    assert stats.ratio_max.item() == pytest.approx(expected[4], rel=1e-11)


def test_the_loss_is_never_below_the_unclipped_one() -> None:
    # Clipping is a pessimistic bound.
    logprobs, old, advantages = random_batch([50] * 4, 0, 1)
    mask = mask_of([50] * 4, 50)
    clipped, _ = policy_loss(logprobs, old, advantages, mask, EPS, 200)
    free, stats = policy_loss(logprobs, old, advantages, mask, 1e9, 200)
    assert clipped.item() > free.item()
    assert stats.clip_fraction.item() == 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    # The rows hold 4, 1 and 2 tokens, so a mean of micro-batch means would be wrong.
    logprobs, old_logprobs, advantages = random_batch(LENGTHS, 0, 2)
    logprobs.requires_grad_()
    whole, whole_stats = policy_loss(logprobs, old_logprobs, advantages, MASK, EPS, 7)
    pieces = zip(
        *(
            torch.split(tensor, list(sizes))
            for tensor in (logprobs, old_logprobs, advantages, MASK)
        ),
        strict=True,
    )
    parts = [policy_loss(new, old, adv, mask, EPS, 7) for new, old, adv, mask in pieces]
    split = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(split, logprobs)[0],
        torch.autograd.grad(whole, logprobs)[0],
        rtol=1e-13,
        atol=0,
    )
    for name in ("approx_kl", "clip_fraction", "ratio"):
        added = math.fsum(getattr(stats, name).item() for _, stats in parts)
        assert added == pytest.approx(getattr(whole_stats, name).item(), rel=1e-13)
    assert max(stats.ratio_max for _, stats in parts) == whole_stats.ratio_max


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["logprobs", "old_logprobs", "advantages", "all"])
def test_masked_positions_have_no_effect(place: str, garbage: float) -> None:
    clean = dict(
        zip(("logprobs", "old_logprobs", "advantages"), random_batch(LENGTHS, 0, 3), strict=True)
    )
    planted = {
        name: tensor.masked_fill(~MASK, garbage) if place in (name, "all") else tensor.clone()
        for name, tensor in clean.items()
    }
    results = []
    for batch in (clean, planted):
        batch["logprobs"].requires_grad_()
        loss, stats = policy_loss(**batch, response_mask=MASK, cliprange=EPS, num_tokens=7)
        results.append((loss, stats, torch.autograd.grad(loss, batch["logprobs"])[0]))
    (loss, stats, gradient), (planted_loss, planted_stats, planted_gradient) = results
    assert planted_loss.item() == loss.item()
    assert [value.item() for value in planted_stats] == [value.item() for value in stats]
    assert torch.equal(planted_gradient, gradient)
    assert planted_gradient[~MASK].tolist() == [0.0] * 5


def test_padding_and_batch_order_have_no_effect() -> None:
    batch = random_batch(LENGTHS, 0, 4)
    loss, stats = policy_loss(*batch, MASK, EPS, 7)
    new, old, adv = (torch.cat([tensor, torch.full_like(tensor, 9.0)], 1) for tensor in batch)
    padded, padded_stats = policy_loss(new, old, adv, mask_of(LENGTHS, 8), EPS, 7)
    order = torch.tensor([2, 0, 1])
    new, old, adv = (tensor[order] for tensor in batch)
    shuffled, shuffled_stats = policy_loss(new, old, adv, MASK[order], EPS, 7)
    for other, other_stats in ((padded, padded_stats), (shuffled, shuffled_stats)):
        assert other.item() == pytest.approx(loss.item(), rel=1e-13)
        for got, expected in zip(other_stats, stats, strict=True):
            assert got.item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("eps_high", [None, 0.4])
def test_gradcheck(eps_high: float | None) -> None:
    logprobs, old, advantages = random_batch(LENGTHS, 0, 5)
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, MASK, EPS, 7, eps_high)[0], logprobs
    )


def test_statistics_carry_no_gradient() -> None:
    logprobs, old, advantages = hand_case()
    loss, stats = policy_loss(logprobs.requires_grad_(), old, advantages, mask_of([4], 4), EPS, 4)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in stats)
