"""Best-of-n: what a reward model's pick among n answers is worth, and at what distance."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from plumbline.evaluation.scores import Interval, bootstrap_mean

Array = np.ndarray
BOUND = re.compile(r"eval/best_of_(\d+)/kl_bound")


class BestOf(NamedTuple):
    """What the best of n answers is worth on average over the prompts."""

    n: int
    kl_bound: float
    """Nats a response."""
    score: Interval
    """Of the reward model that picks."""
    gold: Interval | None
    """Of the answer that it picks; none without a gold scorer."""
    judge: Interval | None
    """The same by the judge."""


def best_of_n_curve(
    scores: ArrayLike,
    *,
    gold: ArrayLike | None = None,
    judge: ArrayLike | None = None,
    bootstrap_samples: int,
    seed: int,
) -> list[BestOf]:
    """The best of n for n = 1, 2, 4, … and N, with 95% bootstrap intervals over prompts.

    Args:
        scores: [P, N], the reward model's scores of N independent answers to each of P prompts.
        gold, judge: [P, N], other scores of the same answers.
        bootstrap_samples: resamplings behind each interval.
        seed: of the resamplings.
    """
    proxy = _table(scores)

    def interval(n: int, values: ArrayLike | None) -> Interval | None:
        if values is None:
            return None
        return bootstrap_mean(expected_best(proxy, n, values), bootstrap_samples, seed)

    return [
        BestOf(
            n,
            kl_bound(n),
            bootstrap_mean(expected_best(proxy, n), bootstrap_samples, seed),
            interval(n, gold),
            interval(n, judge),
        )
        for n in _sizes(proxy.shape[1])
    ]


def expected_best(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> Array:
    """Unbiased estimate of the value of the answer with the highest score among n: [P].

    The mean over all subsets of n of a prompt's N answers. With the answers in ascending order of
    score, the k-th is the best of C(k-1, n-1) of the C(N, n) subsets:
        sum over k of C(k-1, n-1) / C(N, n) * value_(k)
    (the estimator of Nakano et al. 2021, arXiv 2112.09332, appendix I; Gao et al. 2022, arXiv
    2210.10760). Among equal scores the pick is even.

    Args:
        scores: [P, N], what the pick is made by.
        n: size of the subsets, 1 to N.
        values: [P, N], what the picked answer is worth; none takes the scores themselves.

    Raises:
        ValueError: n is not in 1 to N, or the tables are not of one shape.
    """
    proxy = _table(scores)
    total = proxy.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"expected_best: expected 1 <= n <= {total} answers a prompt, got {n}")
    worth = proxy if values is None else _share_ties(proxy, _table(values))
    ascending = np.take_along_axis(worth, np.argsort(proxy, axis=1), axis=1)
    # Python's integers: these coefficients outgrow floats long before their ratio does.
    weights = [math.comb(k - 1, n - 1) / math.comb(total, n) for k in range(1, total + 1)]
    return ascending @ np.array(weights)


def kl_bound(n: int) -> float:
    """Upper bound on KL(best-of-n || model), nats: log n - (n - 1) / n.

    Exact where no two answers have the same score, which needs infinitely many of them (Stiennon
    et al. 2020, arXiv 2009.01325, appendix); a bound otherwise (Beirami et al. 2024, arXiv
    2401.01879), since equal answers cannot be told apart by picking.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"kl_bound: expected n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_metrics(curve: Sequence[BestOf]) -> dict[str, float]:
    """The curve from n = 2 on as metrics, named eval/best_of_N/…"""
    metrics: dict[str, float] = {}
    for point in curve:
        if point.n == 1:
            continue
        prefix = f"eval/best_of_{point.n}"
        metrics[f"{prefix}/kl_bound"] = point.kl_bound
        for name in ("score", "gold", "judge"):
            interval: Interval | None = getattr(point, name)
            if interval is not None:
                metrics |= interval.metrics(f"{prefix}/{name}")
    return metrics


def read_best_of_n(metrics: Mapping[str, float]) -> list[BestOf]:
    """The curve that `best_of_n_metrics` wrote, by n; empty where it is not among the metrics."""
    sizes = sorted(int(found[1]) for name in metrics if (found := BOUND.fullmatch(name)))
    points = []
    for n in sizes:
        prefix = f"eval/best_of_{n}"
        score = Interval.read(metrics, f"{prefix}/score")
        if score is not None:
            others = (Interval.read(metrics, f"{prefix}/{name}") for name in ("gold", "judge"))
            points.append(BestOf(n, metrics[f"{prefix}/kl_bound"], score, *others))
    return points


def _sizes(total: int) -> list[int]:
    powers = [2**exponent for exponent in range(total.bit_length())]
    return powers if powers[-1] == total else [*powers, total]


def _table(values: ArrayLike) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"expected scores of shape [prompts, answers], both at least 1, got {table.shape}"
        )
    return table


def _share_ties(scores: Array, values: Array) -> Array:
    """Give each answer the mean value of the prompt's answers that have its score."""
    if scores.shape != values.shape:
        raise ValueError(
            f"expected a value for each score: shape {scores.shape}, got {values.shape}"
        )
    shared = np.empty_like(values)
    for row, (score, value) in enumerate(zip(scores, values, strict=True)):
        _, group = np.unique(score, return_inverse=True)
        shared[row] = (np.bincount(group, value) / np.bincount(group))[group]
    return shared
