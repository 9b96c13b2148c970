"""What all figures share: colours that the colour-blind can tell apart, axes, signs, smoothing."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from plumbline.evaluation.scores import Interval

History = Sequence[Mapping[str, float]]
"""The metrics of each rollout or optimizer step, in order; not every row has every metric."""

INK, ACCENT, SECOND, MUTED = "#1b1f24", "#0b6e99", "#d1495b", "#8a939c"


def column(history: History, *metrics: str) -> list[list[float]]:
    """The values of metrics in the rows that have all of them as finite numbers, a list each."""
    rows = [
        values
        for values in ([row.get(metric, math.nan) for metric in metrics] for row in history)
        if all(math.isfinite(value) for value in values)
    ]
    return [list(values) for values in zip(*rows, strict=True)] if rows else [[] for _ in metrics]


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average without the start's bias: weight 0 leaves the values alone."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def plain(axes: Axes) -> None:
    """Take away what carries no data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def arms(value: Interval) -> list[list[float]]:
    """How far an error bar reaches below and above its point, as matplotlib takes it: [2, 1]."""
    # A bootstrap interval of values that hardly vary can miss their mean by a rounding error.
    return [[max(value.mean - value.low, 0.0)], [max(value.high - value.mean, 0.0)]]


def sign(label: str, colour: str, marker: str) -> Line2D:
    """A marker, for the legend."""
    return Line2D([], [], label=label, color=colour, marker=marker, markersize=5, linestyle="")
