"""KL estimators against hand values and an exact KL, and the controllers step by step."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.ops.kl import (
    AdaptiveKLController,
    FixedKLController,
    KLEstimator,
    kl_estimate,
)

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=200)

POLICY = [0.5, 0.3, 0.15, 0.05]
REFERENCE = [0.25, 0.25, 0.3, 0.2]
EXACT_KL = math.fsum(p * math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True))


def logs(probabilities: list[float]) -> Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "more_likely", "less_likely"),
    [
        # p = 1/2, q = 1/4: k1 = log 2, exp(-k1) = q / p = 1/2; and the other way round.
        ("k1", math.log(2), -math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 1 / 2 - 1 + math.log(2), 2 - 1 - math.log(2)),
    ],
)
def test_estimators_by_hand(estimator: KLEstimator, more_likely: float, less_likely: float) -> None:
    got = kl_estimate(logs([1 / 2, 1 / 4]), logs([1 / 4, 1 / 2]), estimator)
    assert got.shape == (1, 2)
    assert got[0].tolist() == pytest.approx([more_likely, less_likely], rel=1e-14)


def test_the_default_is_k1() -> None:
    got = kl_estimate(logs([1 / 2]), logs([1 / 4]))
    assert got.item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_policy_equal_to_its_reference_has_no_kl(estimator: KLEstimator) -> None:
    assert kl_estimate(logs(POLICY), logs(POLICY), estimator).tolist() == [[0, 0, 0, 0]]


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="expected k1, k2 or k3, got 'k4'"):
        kl_estimate(logs([0.5]), logs([0.5]), "k4")  # type: ignore[arg-type]


@given(st.floats(-50, 50), st.floats(-50, 50))
@example(-1.0, -1.0 - 1e-9)
@example(-1.0, -1.0 + 1e-9)
@repeatable
def test_k2_and_k3_are_never_negative(logprob: float, ref_logprob: float) -> None:
    policy = torch.tensor([[logprob]], dtype=torch.float64)
    reference = torch.tensor([[ref_logprob]], dtype=torch.float64)
    assert kl_estimate(policy, reference, "k2").item() >= 0
    assert kl_estimate(policy, reference, "k3").item() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_near_zero(dtype: torch.dtype) -> None:
    size = torch.logspace(-18, 0, 20_000, dtype=torch.float64).to(dtype)
    difference = torch.cat([size, -size])
    assert kl_estimate(difference, torch.zeros_like(difference), "k3").min().item() >= 0


def test_k3_keeps_its_digits_near_zero() -> None:
    # exp(-x) - 1 + x = x^2/2 - x^3/6 + ...; here 5e-15, which exp(-x) - 1 would lose to rounding.
    x = torch.tensor([1e-7], dtype=torch.float64)
    got = kl_estimate(x, torch.zeros_like(x), "k3").item()
    assert got == pytest.approx(0.5e-14 - 1e-21 / 6, rel=1e-7, abs=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_of_k1_and_k3_is_the_exact_kl(estimator: KLEstimator) -> None:
    estimates = kl_estimate(logs(POLICY), logs(REFERENCE), estimator)[0].tolist()
    expectation = math.fsum(p * k for p, k in zip(POLICY, estimates, strict=True))
    assert expectation == pytest.approx(EXACT_KL, rel=1e-13)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_drawn_tokens_is_near_the_exact_kl(estimator: KLEstimator) -> None:
    draws = 100_000
    tokens = torch.multinomial(
        torch.tensor(POLICY), draws, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    drawn = kl_estimate(logs(POLICY)[:, tokens], logs(REFERENCE)[:, tokens], estimator)
    standard_error = drawn.std().item() / math.sqrt(draws)
    assert abs(drawn.mean().item() - EXACT_KL) < 4 * standard_error
    assert standard_error < 0.01 * EXACT_KL


def test_k3_varies_less_than_k1_between_close_distributions() -> None:
    close = [0.26, 0.24, 0.31, 0.19]

    def variance(estimator: KLEstimator) -> float:
        estimates = kl_estimate(logs(close), logs(REFERENCE), estimator)[0].tolist()
        mean = math.fsum(p * k for p, k in zip(close, estimates, strict=True))
        return math.fsum(p * (k - mean) ** 2 for p, k in zip(close, estimates, strict=True))

    assert variance("k3") < 0.1 * variance("k1")


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # beta 0.1, target 6, n / horizon = 64 / 640 = 0.1.
        (6.0, 0.1),  # error 0
        (6.6, 0.1 * 1.01),  # error 0.1: 1 + 0.1 * 0.1
        (5.4, 0.1 * 0.99),  # error -0.1
        (7.2, 0.1 * 1.02),  # error 0.2, at the clip
        (60.0, 0.1 * 1.02),  # error 9, clipped to 0.2
        (4.8, 0.1 * 0.98),  # error -0.2, at the clip
        (0.0, 0.1 * 0.98),  # error -1, clipped to -0.2
        (-3.0, 0.1 * 0.98),  # a sampled KL may be negative; the error is clipped all the same
    ],
)
def test_the_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=640)
    controller.update(kl, 64)
    assert controller.value == pytest.approx(expected, rel=1e-14)


def test_adaptive_updates_compound() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=640)
    assert controller.value == 0.1
    for kl in (60.0, 6.6, 0.0):
        controller.update(kl, 64)
    assert controller.value == pytest.approx(0.1 * 1.02 * 1.01 * 0.98, rel=1e-14)


def test_the_step_of_the_coefficient_grows_with_the_episodes() -> None:
    controller = AdaptiveKLController(1.0, target=6.0, horizon=10_000)
    controller.update(60.0, 1)
    assert controller.value == pytest.approx(1 + 0.2 / 10_000, rel=1e-14)
    controller = AdaptiveKLController(1.0, target=6.0, horizon=10_000)
    controller.update(60.0, 512)
    assert controller.value == pytest.approx(1 + 0.2 * 512 / 10_000, rel=1e-14)
