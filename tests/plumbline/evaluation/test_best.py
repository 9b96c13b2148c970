"""Which point of a sweep is the best, and the words for it."""

import math

import pytest

from plumbline.evaluation.best import SweepPoint, best_point, rule_in_words, why_no_best


def point(number: int, kl: float, gold: float, **more: float) -> SweepPoint:
    metrics = {"eval/policy/kl": kl, "eval/policy/gold": gold}
    return SweepPoint(number, f"n={number}", metrics | {f"eval/{k}": v for k, v in more.items()})


POINTS = [point(1, 0.5, 0.6, win_rate=0.9), point(2, 9.0, 0.8, win_rate=0.7), point(3, 12.0, 0.9)]


@pytest.mark.parametrize(
    ("metric", "budget", "best"),
    [
        ("gold", 10.0, 2),
        ("gold", 9.0, 2),
        ("gold", 8.9, 1),
        ("gold", None, 3),
        ("gold", 0.4, None),
        ("win_rate", 10.0, 1),
        ("judge", 10.0, None),
    ],
)
def test_it_is_the_highest_within_the_budget(
    metric: str, budget: float | None, best: int | None
) -> None:
    found = best_point(POINTS, metric, budget)
    assert (found.number if found else None) == best


def test_of_equals_it_is_the_one_with_less_kl() -> None:
    found = best_point([point(1, 3.0, 0.8), point(2, 2.0, 0.8)], "gold", 10.0)
    assert found is not None
    assert found.number == 2


def test_a_metric_that_is_no_number_never_wins() -> None:
    found = best_point([point(1, 1.0, math.nan), point(2, 1.0, 0.1)], "gold", 10.0)
    assert found is not None
    assert found.number == 2


def test_the_rule_is_told_in_words() -> None:
    assert rule_in_words("gold", 10.0) == (
        "highest gold score among the points with KL ≤ 10 nats a response"
    )
    assert rule_in_words("win_rate", None) == "highest win rate over SFT among all points"


def test_why_there_is_none_is_told_too() -> None:
    assert why_no_best([], 10.0) == "no point finished"
    assert why_no_best(POINTS, 0.4) == (
        "no point has KL ≤ 0.4 nats a response; the nearest is n=1 with 0.50"
    )
