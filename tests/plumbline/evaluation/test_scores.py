"""The numbers of the comparison against hand values."""

import math

import numpy as np
import pytest

from plumbline.evaluation.scores import (
    Interval,
    bootstrap_mean,
    calibration_bins,
    correlation,
    distinct_n,
    expected_calibration_error,
    label_calibration,
    mean_gain,
    pair_calibration,
    wilson_interval,
    win_rate,
)


def pair_error(margins: list[float], bins: int = 10) -> float:
    return expected_calibration_error(pair_calibration(margins, bins))


def test_ties_count_half() -> None:
    result = win_rate([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 4.0, 0.0], samples=100, seed=0)
    assert result.mean == (0.5 + 1 + 0 + 1) / 4


def test_a_win_rate_of_ties_only_is_certain() -> None:
    assert win_rate([1.0, 2.0], [1.0, 2.0], samples=100, seed=0) == (0.5, 0.5, 0.5)


def test_winning_and_losing_everywhere() -> None:
    ours, theirs = [2.0, 3.0, 4.0], [1.0, 2.0, 3.0]
    assert win_rate(ours, theirs, samples=100, seed=0) == (1, 1, 1)
    assert win_rate(theirs, ours, samples=100, seed=0) == (0, 0, 0)


def test_scores_are_paired_by_prompt() -> None:
    assert win_rate([1.0, 9.0], [2.0, 3.0], samples=100, seed=0).mean == 0.5


def test_a_gain_is_paired_by_prompt() -> None:
    # Prompts differ by far more than the models do: only pairing shows that each gains 1.
    theirs = [0.0, 100.0, -50.0, 7.0]
    gain = mean_gain([value + 1 for value in theirs], theirs, samples=200, seed=0)
    assert gain == pytest.approx((1, 1, 1))
    assert mean_gain(theirs, [0.0] * 4, samples=200, seed=0).mean == pytest.approx(57 / 4)
    low, high = mean_gain(theirs, [0.0] * 4, samples=200, seed=0)[1:]
    assert low < 57 / 4 < high


def test_an_interval_as_metrics() -> None:
    assert Interval(1.0, 0.5, 2.0).metrics("eval/x") == {
        "eval/x": 1, "eval/x_low": 0.5, "eval/x_high": 2,
    }  # fmt: skip


def test_an_interval_is_read_from_its_three_metrics() -> None:
    metrics = {**Interval(1.0, 0.5, 2.0).metrics("a"), "b": 3.0, "b_low": 2.0}
    assert Interval.read(metrics, "a") == Interval(1.0, 0.5, 2.0)
    assert Interval.read(metrics, "b") is None


def test_the_bootstrap_interval_of_a_share_is_the_normal_one() -> None:
    values = [1.0] * 300 + [0.0] * 100
    mean, low, high = bootstrap_mean(values, samples=4000, seed=0)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.005)
    assert high == pytest.approx(0.75 + half, abs=0.005)


def test_the_bootstrap_is_seeded() -> None:
    values = np.linspace(0, 1, 20)
    first, again, other = (bootstrap_mean(values, 200, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.low != other.low


def test_the_bootstrap_of_one_value_is_that_value() -> None:
    assert bootstrap_mean([3.0], 100, 0) == (3, 3, 3)


def test_the_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one value, got none"):
        bootstrap_mean([], 100, 0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Published values of the score interval (Newcombe 1998, table I, method 3).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    result = wilson_interval(successes, trials)
    assert result.mean == successes / trials
    assert result.low == pytest.approx(low, abs=5e-5)
    assert result.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_is_symmetric() -> None:
    ours, theirs = wilson_interval(3, 10), wilson_interval(7, 10)
    assert ours.low == pytest.approx(1 - theirs.high)
    assert ours.high == pytest.approx(1 - theirs.low)


def test_wilson_interval_of_no_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one trial, got 0"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["a b", "a b", "a c"], 2, 2 / 3),
        # No n-gram goes across two texts.
        (["a b", "c d"], 2, 1.0),
        (["a", ""], 2, 0.0),
        ([], 1, 0.0),
        (["one answer to all"] * 50, 2, 1 / 50),
    ],
)
def test_distinct_n(texts: list[str], n: int, expected: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_calibration_by_hand() -> None:
    # Margins of log 3 and log 9: confidences 0.75 and 0.9, in the bins [0.7, 0.8), [0.9, 1].
    three, nine = math.log(3), math.log(9) + 1e-9
    margins = [three, three, three, -three, nine, nine, -nine, -nine]
    assert pair_error(margins, bins=5) == pytest.approx(0.5 * 0 + 0.5 * 0.4)


def test_calibration_of_certainty() -> None:
    assert pair_error([1000.0, 1000.0]) == pytest.approx(0)
    assert pair_error([-1000.0]) == pytest.approx(1)


def test_a_model_that_says_what_it_knows_is_calibrated() -> None:
    generator = np.random.default_rng(0)
    size = generator.uniform(0, 4, 100_000)
    right = generator.random(100_000) < 1 / (1 + np.exp(-size))
    margins = np.where(right, size, -size)
    assert pair_error(list(margins)) < 0.01
    assert pair_error(list(3 * margins)) > 0.1


def test_bins_of_pairs_by_hand() -> None:
    three = math.log(3)
    first, last = pair_calibration([three, three, -three, 50.0], bins=5)
    assert first[:4] == pytest.approx((0.7, 0.8, 3, 0.75))
    assert first.share == wilson_interval(2, 3)
    assert last[:4] == pytest.approx((0.9, 1.0, 1, 1.0))
    assert last.share == wilson_interval(1, 1)


def test_bins_of_labels_by_hand() -> None:
    three = math.log(3)
    low, high = label_calibration([-three, -three, -three, -three, three], [1, 0, 0, 0, 1], bins=2)
    assert low[:4] == pytest.approx((0.0, 0.5, 4, 0.25))
    assert low.share == wilson_interval(1, 4)
    assert high[:4] == pytest.approx((0.5, 1.0, 1, 0.75))
    assert expected_calibration_error([low, high]) == pytest.approx(0.2 * 0.25)


def test_certain_labels_fall_into_the_outer_bins() -> None:
    low, high = label_calibration([-1000.0, 1000.0], [False, False])
    assert (low.low, low.stated, low.share.mean) == (0, 0, 0)
    assert (high.high, high.stated, high.share.mean) == (1, 1, 0)
    assert expected_calibration_error([low, high]) == 0.5


def test_each_prediction_needs_an_outcome() -> None:
    with pytest.raises(ValueError, match="an outcome for each of 2 predictions, got 1"):
        calibration_bins(np.array([0.1, 0.9]), [True], bins=10)


def test_calibration_of_nothing_is_refused() -> None:
    assert pair_calibration([]) == []
    with pytest.raises(ValueError, match="expected at least one prediction, got none"):
        pair_error([])


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2).
    assert correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_what_does_not_vary_correlates_with_nothing() -> None:
    assert correlation([1, 1, 1], [1, 2, 3]) == correlation([1, 2, 3], [1, 1, 1]) == 0
