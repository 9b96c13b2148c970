"""Best-of-n against the enumeration of all subsets, and its KL bound against exact KLs."""

import math
from itertools import combinations, product

import numpy as np
import pytest

from plumbline.evaluation.best_of_n import (
    best_of_n_curve,
    best_of_n_metrics,
    expected_best,
    kl_bound,
    read_best_of_n,
)

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(4, 7))
VALUES = GENERATOR.normal(size=(4, 7))


def mean_over_subsets(scores: list[float], values: list[float], n: int) -> float:
    """The mean value of the best in each subset of n answers, equally good ones sharing it."""
    picked = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[index] for index in subset)
        winners = [values[index] for index in subset if scores[index] == top]
        picked.append(math.fsum(winners) / len(winners))
    return math.fsum(picked) / len(picked)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    for values in (SCORES, VALUES):
        naive = [
            mean_over_subsets(list(row), list(worth), n)
            for row, worth in zip(SCORES, values, strict=True)
        ]
        np.testing.assert_allclose(expected_best(SCORES, n, values), naive, atol=1e-12)
    np.testing.assert_allclose(
        expected_best(SCORES, n), [mean_over_subsets([*row], [*row], n) for row in SCORES]
    )


@pytest.mark.parametrize("n", range(1, 7))
def test_equal_scores_share_the_pick(n: int) -> None:
    scores = [[1.0, 1.0, 0.0, 1.0, 0.0, 2.0], [3.0] * 6]
    values = [[5.0, 1.0, 2.0, -4.0, 0.5, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]]
    naive = [mean_over_subsets(s, v, n) for s, v in zip(scores, values, strict=True)]
    np.testing.assert_allclose(expected_best(scores, n, values), naive, atol=1e-12)


def test_the_best_by_hand() -> None:
    # Subsets of two: the best of {0, 3} and {1, 3} is 3, of {0, 1} it is 1.
    assert expected_best([[3.0, 0.0, 1.0]], 2).tolist() == pytest.approx([7 / 3])
    assert expected_best([[3.0, 0.0, 1.0]], 2, [[-1.0, 5.0, 4.0]]).tolist() == pytest.approx(
        [(-1 - 1 + 4) / 3]
    )
    assert expected_best([[3.0, 0.0, 1.0]], 1).tolist() == pytest.approx([4 / 3])
    assert expected_best([[3.0, 0.0, 1.0]], 3).tolist() == [3]


def test_the_estimate_is_unbiased() -> None:
    # Three answers from {0: 0.5, 1: 0.3, 2: 0.2}, enumerated: the mean estimate of the best of
    # two is the expectation of the best of two.
    chances = (0.5, 0.3, 0.2)
    mean_estimate = math.fsum(
        math.prod(chances[answer] for answer in drawn)
        * float(expected_best([[float(answer) for answer in drawn]], 2)[0])
        for drawn in product(range(3), repeat=3)
    )
    best_of_two = math.fsum(chances[a] * chances[b] * max(a, b) for a in range(3) for b in range(3))
    assert mean_estimate == pytest.approx(best_of_two, abs=1e-12)


def test_many_answers_do_not_overflow() -> None:
    scores = np.random.default_rng(1).normal(size=(2, 256))
    best = [float(expected_best(scores, n).mean()) for n in (1, 2, 16, 128, 256)]
    assert best == sorted(best)
    assert best[0] == pytest.approx(float(scores.mean()))
    assert best[-1] == pytest.approx(float(scores.max(1).mean()))


@pytest.mark.parametrize("n", [0, 8])
def test_more_than_there_are_cannot_be_picked_from(n: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 1 <= n <= 7 answers a prompt, got {n}"):
        expected_best(SCORES, n)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [[[1.0]]]])
def test_scores_are_a_table(scores: list[object]) -> None:
    with pytest.raises(ValueError, match=r"shape \[prompts, answers\]"):
        expected_best(scores, 1)


def test_each_score_needs_a_value() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 7\), got \(4, 6\)"):
        expected_best(SCORES, 2, VALUES[:, :6])


def exact_kl(chances: list[float], scores: list[float], n: int) -> float:
    """KL(best-of-n || model) by enumerating every n draws; equal scores share the pick."""
    picked = [0.0] * len(chances)
    for drawn in product(range(len(chances)), repeat=n):
        top = max(scores[answer] for answer in drawn)
        winners = [answer for answer in drawn if scores[answer] == top]
        chance = math.prod(chances[answer] for answer in drawn)
        for answer in winners:
            picked[answer] += chance / len(winners)
    assert math.fsum(picked) == pytest.approx(1)
    return math.fsum(p * math.log(p / q) for p, q in zip(picked, chances, strict=True) if p > 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("chances", "scores"),
    [
        ([0.5, 0.2, 0.2, 0.1], [0.0, 1.0, 2.0, 3.0]),
        ([0.1, 0.2, 0.2, 0.5], [0.0, 1.0, 2.0, 3.0]),
        ([0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 2.0, 3.0]),
        ([0.97, 0.01, 0.01, 0.01], [0.0, 1.0, 1.0, 0.0]),
        ([0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_bound_holds_where_the_distribution_is_known(
    chances: list[float], scores: list[float], n: int
) -> None:
    kl = exact_kl(chances, scores, n)
    assert -1e-12 <= kl <= kl_bound(n) + 1e-12


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_bound_is_reached_where_no_two_answers_are_equally_good(n: int) -> None:
    # K equally likely answers of different scores: the k-th is the best with (k^n - (k-1)^n) / K^n.
    def kl(answers: int) -> float:
        rank = np.arange(1, answers + 1) / answers
        picked = rank**n - (rank - 1 / answers) ** n
        # The worst are picked so seldom that floats call it never.
        picked = picked[picked > 0]
        return float(np.sum(picked * np.log(picked * answers)))

    assert kl(200_000) == pytest.approx(kl_bound(n), rel=1e-4)
    assert kl(10) < kl(100) < kl_bound(n)


def test_the_bound_by_hand() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(0.1931471805599453)
    assert kl_bound(8) == pytest.approx(1.2044415416798357)
    with pytest.raises(ValueError, match="expected n >= 1, got 0"):
        kl_bound(0)


def test_the_curve_doubles_up_to_all_answers() -> None:
    sizes = {
        total: [p.n for p in best_of_n_curve(np.zeros((1, total)), bootstrap_samples=100, seed=0)]
        for total in (1, 2, 6, 8)
    }
    assert sizes == {1: [1], 2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}


def test_the_curve_has_every_scorer_with_its_interval() -> None:
    curve = best_of_n_curve(SCORES, gold=VALUES, judge=2 * VALUES, bootstrap_samples=200, seed=0)
    for point in curve:
        assert point.kl_bound == kl_bound(point.n)
        assert point.gold is not None
        assert point.judge is not None
        assert point.score.mean == pytest.approx(
            np.mean([mean_over_subsets([*row], [*row], point.n) for row in SCORES])
        )
        assert point.gold.mean == pytest.approx(
            np.mean(
                [
                    mean_over_subsets([*row], [*worth], point.n)
                    for row, worth in zip(SCORES, VALUES, strict=True)
                ]
            )
        )
        assert point.judge.mean == pytest.approx(2 * point.gold.mean)
        assert point.gold.low < point.gold.mean < point.gold.high
    assert best_of_n_curve(SCORES, bootstrap_samples=200, seed=0)[0].gold is None
    assert best_of_n_curve(SCORES, bootstrap_samples=200, seed=0)[0].judge is None


def test_the_interval_is_over_prompts_and_seeded() -> None:
    # Answers differ within a prompt, prompts do not: nothing is uncertain over prompts.
    alike = best_of_n_curve([[0.0, 1.0, 5.0]] * 6, bootstrap_samples=100, seed=0)
    assert alike[1].score.low == pytest.approx(alike[1].score.high)
    first, again, other = (
        best_of_n_curve(SCORES, bootstrap_samples=100, seed=seed)[1].score for seed in (0, 0, 1)
    )
    assert first == again
    assert first.low != other.low


def test_metrics_leave_out_the_best_of_one_and_absent_scorers() -> None:
    curve = best_of_n_curve(SCORES[:, :2], gold=VALUES[:, :2], bootstrap_samples=100, seed=0)
    metrics = best_of_n_metrics(curve)
    assert set(metrics) == {"eval/best_of_2/kl_bound"} | {
        f"eval/best_of_2/{name}{end}" for name in ("score", "gold") for end in ("", "_low", "_high")
    }
    assert metrics["eval/best_of_2/score_low"] == curve[1].score.low
    assert metrics["eval/best_of_2/kl_bound"] == kl_bound(2)


@pytest.mark.parametrize("others", [{}, {"gold": VALUES}, {"gold": VALUES, "judge": -VALUES}])
def test_the_metrics_say_all_of_the_curve_but_its_first_point(
    others: dict[str, np.ndarray],
) -> None:
    curve = best_of_n_curve(SCORES, **others, bootstrap_samples=100, seed=0)
    metrics = {"eval/win_rate": 0.5, **best_of_n_metrics(curve)}
    assert read_best_of_n(metrics) == curve[1:]


def test_a_point_that_was_logged_in_part_is_left_out() -> None:
    metrics = best_of_n_metrics(best_of_n_curve(SCORES, bootstrap_samples=100, seed=0))
    del metrics["eval/best_of_4/score_low"]
    assert [point.n for point in read_best_of_n(metrics)] == [2, 7]
