"""Numbers that compare the answers of two models."""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import numpy as np

GoldScorer = Callable[[str, str], float]
"""Takes a prompt (JSON messages) and a response (text); returns a score."""


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    mean: float
    low: float
    high: float


def win_rate(ours: Sequence[float], theirs: Sequence[float], samples: int, seed: int) -> Interval:
    """Share of the prompts on which we score higher, ties counted half, with its interval.

    Args:
        ours, theirs: one score a prompt, paired.
        samples: bootstrap resamplings.
        seed: of the resamplings.
    """
    wins = np.sign(np.asarray(ours) - np.asarray(theirs)) / 2 + 0.5
    return bootstrap_mean(wins, samples, seed)


def bootstrap_mean(values: Sequence[float] | np.ndarray, samples: int, seed: int) -> Interval:
    """Mean with the 2.5% and 97.5% percentiles of its bootstrap distribution (Efron 1979).

    Raises:
        ValueError: there is no value.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("bootstrap_mean: expected at least one value, got none")
    generator = np.random.default_rng(seed)
    means = np.array(
        [data[generator.integers(data.size, size=data.size)].mean() for _ in range(samples)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


def wilson_interval(successes: int, trials: int) -> Interval:
    """A share with its 95% interval by Wilson 1927, which holds for shares near 0 and 1, too.

    Raises:
        ValueError: there was no trial.
    """
    if trials <= 0:
        raise ValueError(f"wilson_interval: expected at least one trial, got {trials}")
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half /= 1 + z * z / trials
    return Interval(share, centre - half, centre + half)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all n-grams (Li et al. 2016, arXiv 1510.03055).

    It falls towards 0 when a model gives one answer to everything. 0 where no text has n words.
    """
    grams = [
        gram
        for words in (text.split() for text in texts)
        for gram in zip(*(words[i:] for i in range(n)), strict=False)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error of a reward model's stated confidence.

    A pair with margin m = r_chosen - r_rejected is called right with confidence
    sigmoid(|m|) >= 0.5 and is right where m > 0. ECE = sum over bins of share * |accuracy -
    confidence| (Guo et al. 2017, arXiv 1706.04599, eq. 3), bins equally wide from 0.5 to 1.
    """
    margin = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = margin > 0
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for index in range(bins):
        chosen = place == index
        if chosen.any():
            error += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    return float(error)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    if np.std(x) == 0 or np.std(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def load_gold(name: str) -> GoldScorer:
    """Import the gold scorer that `module:function` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        scorer: GoldScorer = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"evaluate.gold: expected module:function that can be imported, got {name!r} ({error})"
        ) from error
    return scorer
