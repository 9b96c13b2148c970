"""Numbers that compare the answers of two models."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    mean: float
    low: float
    high: float

    def metrics(self, name: str) -> dict[str, float]:
        """The estimate and the ends of its interval as name, name_low and name_high."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}

    @classmethod
    def read(cls, metrics: Mapping[str, float], name: str) -> "Interval | None":
        """What `metrics` wrote under this name; None where one of the three is missing."""
        names = (name, f"{name}_low", f"{name}_high")
        return cls(*(metrics[n] for n in names)) if all(n in metrics for n in names) else None


class CalibrationBin(NamedTuple):
    """The predictions whose stated probability falls into one interval."""

    low: float
    high: float
    size: int
    stated: float
    """Mean of the stated probabilities."""
    share: Interval
    """Share of the predictions that came true, with its Wilson interval."""


def win_rate(ours: Sequence[float], theirs: Sequence[float], samples: int, seed: int) -> Interval:
    """Share of the prompts on which we score higher, ties counted half, with its interval.

    Args:
        ours, theirs: one score a prompt, paired.
        samples: bootstrap resamplings.
        seed: of the resamplings.
    """
    wins = np.sign(np.asarray(ours) - np.asarray(theirs)) / 2 + 0.5
    return bootstrap_mean(wins, samples, seed)


def mean_gain(ours: Sequence[float], theirs: Sequence[float], samples: int, seed: int) -> Interval:
    """Mean of our scores less theirs on the same prompts, with its interval.

    Pairing takes out what makes a prompt easy or hard for both.

    Args:
        ours, theirs: one score a prompt, paired.
        samples: bootstrap resamplings.
        seed: of the resamplings.
    """
    return bootstrap_mean(np.asarray(ours) - np.asarray(theirs), samples, seed)


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


def pair_calibration(margins: Sequence[float], bins: int = 10) -> list[CalibrationBin]:
    """Confidence of a pairwise reward model against how often it is right.

    A pair with margin m = r_chosen - r_rejected is called right with confidence
    sigmoid(|m|) >= 0.5 and is right where m > 0.
    """
    margin = np.asarray(margins, dtype=np.float64)
    return calibration_bins(_sigmoid(np.abs(margin)), margin > 0, bins, low=0.5)


def label_calibration(
    scores: Sequence[float], labels: Sequence[bool], bins: int = 10
) -> list[CalibrationBin]:
    """P(good) = sigmoid(score) of a pointwise reward model against the share labelled good.

    Args:
        scores: before normalisation, which moves them away from log odds.
        labels: True = good, one a score.
        bins: at most so many come back.
    """
    return calibration_bins(_sigmoid(np.asarray(scores, dtype=np.float64)), labels, bins)


def calibration_bins(
    stated: np.ndarray, came_true: Sequence[bool] | np.ndarray, bins: int, low: float = 0.0
) -> list[CalibrationBin]:
    """Group predictions by their stated probability, in equally wide bins from `low` to 1.

    Args:
        stated: [N], probabilities from `low` to 1.
        came_true: [N], bool.
        bins: of which those without a prediction are left out.
        low: the least probability that can be stated.

    Raises:
        ValueError: the two differ in length.
    """
    true = np.asarray(came_true, dtype=bool)
    if stated.shape != true.shape:
        raise ValueError(
            f"calibration_bins: expected an outcome for each of {stated.size} predictions, "
            f"got {true.size}"
        )
    width = (1 - low) / bins
    place = np.minimum(((stated - low) / width).astype(int), bins - 1)
    return [
        CalibrationBin(
            low=low + index * width,
            high=low + (index + 1) * width,
            size=int(chosen.sum()),
            stated=float(stated[chosen].mean()),
            share=wilson_interval(int(true[chosen].sum()), int(chosen.sum())),
        )
        for index, chosen in ((index, place == index) for index in range(bins))
        if chosen.any()
    ]


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """ECE = sum over bins of size / N * |share - stated| (Guo et al. 2017, 1706.04599, eq. 3).

    Raises:
        ValueError: there is no prediction.
    """
    total = sum(part.size for part in bins)
    if total == 0:
        raise ValueError("expected_calibration_error: expected at least one prediction, got none")
    return sum(part.size * abs(part.share.mean - part.stated) for part in bins) / total


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp would overflow at large negative numbers.
    result: np.ndarray = 0.5 * (1 + np.tanh(x / 2))
    return result


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    if np.std(x) == 0 or np.std(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
