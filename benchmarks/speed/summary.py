"""Medians, spreads, ratios, straight lines, and whether a bar is reached."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self


class Spread(NamedTuple):
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The median with the lowest and the highest value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("expected at least one measurement, got none")
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """Median and, where they differ, lowest and highest."""
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} [{number(self.low)}, {number(self.high)}]"


Turns = Mapping[int, float]
"""A value a turn."""


def ratios(ours: Turns, theirs: Turns) -> Spread:
    """Ours over theirs, each turn by itself, for the machine may differ between turns.

    Raises:
        ValueError: no turn has both.
    """
    return Spread.of([ours[turn] / theirs[turn] for turn in ours if turn in theirs])


class Line(NamedTuple):
    """A straight line through measurements, y = intercept + slope * x."""

    slope: float
    intercept: float
    r_squared: float
    """Share of the variance of y that the line explains."""

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Self:
        """The line with the least squares.

        Raises:
            ValueError: fewer than three points, or all with one x.
        """
        if len(x) != len(y) or len(set(x)) < 3:
            raise ValueError(f"expected three different x or more with a y each, got {x} and {y}")
        slope, intercept = statistics.linear_regression(x, y)
        mean = statistics.fmean(y)
        total = sum((value - mean) ** 2 for value in y)
        left = sum((value - intercept - slope * at) ** 2 for at, value in zip(x, y, strict=True))
        return cls(slope, intercept, 1 - left / total if total else 0.0)


class Difference(NamedTuple):
    """A mean of paired differences with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """By the normal distribution, from independent differences.

        Raises:
            ValueError: fewer than two.
        """
        if len(values) < 2:
            raise ValueError(f"expected two differences or more, got {len(values)}")
        mean = statistics.fmean(values)
        half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        """Mean and interval, with the sign."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


class Bar(NamedTuple):
    """What a figure must reach."""

    limit: float
    at_least: bool
    unit: str = ""

    def __str__(self) -> str:
        """As a table says it."""
        return f"{'≥' if self.at_least else '≤'} {number(self.limit)}{self.unit}"

    def verdict(self, value: float) -> str:
        """`reached`, or by what share of the bar it was missed."""
        if value >= self.limit if self.at_least else value <= self.limit:
            return "reached"
        if not self.limit:
            return f"**missed by {number(abs(value))}**"
        share = abs(value - self.limit) / self.limit
        return f"**missed by {100 * share:.3g}%**"


def number(value: float) -> str:
    """Three digits that count, and all before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
