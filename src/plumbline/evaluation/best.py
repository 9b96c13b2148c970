"""Which point of a sweep is the best: the highest metric within a KL budget."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KL = "eval/policy/kl"
METRICS = {
    "gold": ("eval/policy/gold", "gold score"),
    "judge": ("eval/policy/judge", "judge's score"),
    "score": ("eval/policy/score", "reward-model score"),
    "win_rate": ("eval/win_rate", "win rate over SFT"),
}
"""What a point can be the best in: its metric, and its name in words."""


class SweepPoint(NamedTuple):
    """A finished point."""

    number: int
    label: str
    metrics: Mapping[str, float]
    """Of `plumbline.evaluation.compare.compare`."""


def rule_in_words(metric: str, kl_at_most: float | None) -> str:
    """The rule by which the best point is chosen."""
    among = "all points"
    if kl_at_most is not None:
        among = f"the points with KL ≤ {kl_at_most:g} nats a response"
    return f"highest {METRICS[metric][1]} among {among}"


def best_point(
    points: Sequence[SweepPoint], metric: str, kl_at_most: float | None
) -> SweepPoint | None:
    """The point with the highest metric whose KL is within the budget; None where none is.

    Of equally good ones it is the one with the smaller KL. Both numbers are the estimates on the
    held-out prompts, not the ends of their intervals.

    Args:
        points: the finished ones.
        metric: a key of `METRICS`.
        kl_at_most: nats a response; None sets no limit.
    """
    name, _ = METRICS[metric]
    candidates = [p for p in points if math.isfinite(p.metrics.get(name, math.nan))]
    if kl_at_most is not None:
        candidates = [p for p in candidates if p.metrics[KL] <= kl_at_most]
    return max(candidates, key=lambda p: (p.metrics[name], -p.metrics[KL]), default=None)


def why_no_best(points: Sequence[SweepPoint], kl_at_most: float | None) -> str:
    """Say why `best_point` found none."""
    if not points:
        return "no point finished"
    if kl_at_most is None:
        return "no point has the metric"
    near = min(points, key=lambda point: point.metrics[KL])
    return (
        f"no point has KL ≤ {kl_at_most:g} nats a response; the nearest is {near.label} with "
        f"{near.metrics[KL]:.2f}"
    )
