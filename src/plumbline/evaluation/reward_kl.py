"""The figure of over-optimisation: scores against the distance from the reference."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plumbline.evaluation.best_of_n import BestOf
from plumbline.evaluation.scores import Interval
from plumbline.evaluation.style import ACCENT, INK, MUTED, SECOND, History, column, plain

GOLD_CURVE = "objective/reward_gold_score"
KL = "objective/kl"
SCORERS = {
    "score": "reward model (proxy)",
    "gold": "gold score",
    "judge": "independent judge",
}
"""What scores answers, as in the metrics of `compare` and the fields of `BestOf`; its label."""
DISTANCE = "√KL(model ‖ SFT), √nats a response"
RL = "rollouts of RL, the later the darker"
BEST_OF_N = "best of n answers of SFT, held-out prompts, at the KL bound"
HELD_OUT = "one answer, held-out prompts (bars: 95% intervals)"


class _Scorer(NamedTuple):
    name: str
    label: str
    curve: str
    """Its metric during training."""
    colour: str
    line: str


def reward_against_kl(
    history: History,
    title: str,
    *,
    best_of_n: Sequence[BestOf] = (),
    held_out: Mapping[str, float] | None = None,
    gold_curve: str = GOLD_CURVE,
) -> Figure:
    """Scores against sqrt(KL), where over-optimisation shows (Gao et al. 2022, fig. 1).

    The proxy, which training follows, and each independent score have a panel of their own, for
    their units differ: a gold score is no log odds. A panel is there where there is anything to
    draw in it. A line marks where an independent score peaks, if it turns down afterwards.

    Args:
        history: a row a rollout; empty where there was no RL.
        title: stands above the figure.
        best_of_n: points at the KL bound, from `best_of_n_curve`.
        held_out: the metrics of `compare`: SFT and policy with their intervals.
        gold_curve: the metric of the gold score during training, where it is logged.
    """
    metrics = held_out or {}
    curves = scorer_curves(history, gold_curve)
    scorers = [
        _Scorer(name, label, curves[name], ACCENT if name == "score" else SECOND, line)
        for (name, label), line in zip(SCORERS.items(), ("--", "-", "-"), strict=True)
    ]
    shown = [s for s in scorers if s.name == "score" or _has(s, history, best_of_n, metrics)]
    figure = Figure(figsize=(6.4, 1.6 + 2.5 * len(shown)), layout="constrained", dpi=110)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, scorer in zip(panels, shown, strict=True):
        _trajectory(axes, scorer, history)
        _best_of_n(axes, scorer, best_of_n)
        _held_out(axes, scorer, metrics)
        axes.set_ylabel(scorer.label)
        plain(axes)
        axes.margins(x=0.06, y=0.14)
    for index, scorer in enumerate(shown[1:], 1):
        # Through the proxy, too, to show that it still rises there; two lines would confuse.
        _mark_peak(panels[index], scorer, history, panels[0] if index == 1 else None)
    _legend(panels[0])
    figure.align_ylabels(panels)
    panels[-1].set_xlabel(DISTANCE)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
    return figure


def scorer_curves(history: History, gold_curve: str) -> dict[str, str]:
    """The metric of each of `SCORERS` during training."""
    raw = any("objective/reward_model" in row for row in history)
    return {
        "score": "objective/reward_model" if raw else "objective/scores",
        "gold": gold_curve,
        "judge": "objective/judge",
    }


def turning_point(values: Sequence[float]) -> int | None:
    """Index of the peak of a noisy curve that turns down afterwards, else none.

    The curve has turned where, smoothed, it ends below its peak by more than four standard errors
    of the difference. The noise of a value is the std of the steps between neighbours over sqrt(2),
    which a trend hardly touches.
    """
    if len(values) < 5:
        return None
    smoothed = centred(values)
    peak, last = int(np.argmax(smoothed)), len(values) - 1
    noise = np.std(np.diff(values)) / math.sqrt(2)
    error = noise * np.linalg.norm(_weights(len(values), peak) - _weights(len(values), last))
    # Values that do not vary at all have no error, and differ by rounding alone.
    least = max(4 * error, 1e-9 * abs(smoothed[peak]))
    return peak if smoothed[peak] - smoothed[last] > least else None


def centred(values: Sequence[float]) -> np.ndarray:
    """Gaussian smoothing, which, unlike `smooth`, does not lag behind."""
    size = len(values)
    kernel = _gaussian(np.arange(1 - size, size), size)

    def spread(x: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.convolve(x, kernel)[size - 1 : 2 * size - 1]

    smoothed: np.ndarray = spread(values) / spread(np.ones(size))
    return smoothed


def _weights(size: int, index: int) -> np.ndarray:
    """What each of the values adds to the smoothed one at `index`."""
    weights = _gaussian(np.arange(size) - index, size)
    normalised: np.ndarray = weights / weights.sum()
    return normalised


def _gaussian(distance: np.ndarray, size: int) -> np.ndarray:
    weights: np.ndarray = np.exp(-0.5 * (distance / max(1.5, size / 25)) ** 2)
    return weights


def distances_of(kl: Sequence[float]) -> list[float]:
    """The square roots of KLs, in √nats."""
    # The estimate of a KL near 0 can come out negative.
    return [math.sqrt(max(value, 0.0)) for value in kl]


def _has(
    scorer: _Scorer, history: History, best_of_n: Sequence[BestOf], held_out: Mapping[str, float]
) -> bool:
    return (
        any(scorer.curve in row for row in history)
        or any(getattr(point, scorer.name) for point in best_of_n)
        or f"eval/policy/{scorer.name}" in held_out
    )


def _trajectory(axes: Axes, scorer: _Scorer, history: History) -> None:
    """The rollouts of training, the later the darker, and the line through them."""
    kl, scores = column(history, KL, scorer.curve)
    if not kl:
        return
    distances = distances_of(kl)
    shades = to_rgba_array([scorer.colour] * len(scores), np.linspace(0.2, 0.7, len(scores)))
    axes.scatter(distances, scores, color=shades, s=12, linewidths=0, zorder=2)
    axes.plot(
        centred(distances), centred(scores), label=RL, marker="o", markevery=[],
        color=scorer.colour, linestyle=scorer.line, linewidth=1.8, zorder=3,
    )  # fmt: skip


def _best_of_n(axes: Axes, scorer: _Scorer, best_of_n: Sequence[BestOf]) -> None:
    points = [(p, getattr(p, scorer.name)) for p in best_of_n if getattr(p, scorer.name)]
    if not points:
        return
    distances = [math.sqrt(point.kl_bound) for point, _ in points]
    axes.plot(
        distances, [value.mean for _, value in points], label=BEST_OF_N, marker="s", markevery=[],
        color=INK, linewidth=0.9, zorder=3,
    )  # fmt: skip
    for distance, (point, value) in zip(distances, points, strict=True):
        if point.n == 1:
            continue
        _interval(axes, distance, value, INK, "s")
        axes.annotate(
            f"{point.n}", (distance, value.high), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=7, color=INK,
        )  # fmt: skip


def _held_out(axes: Axes, scorer: _Scorer, metrics: Mapping[str, float]) -> None:
    for name, label in (("sft", "SFT"), ("policy", "policy")):
        key = f"eval/{name}/{scorer.name}"
        if key not in metrics:
            continue
        value = Interval(metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"])
        (distance,) = distances_of([metrics[f"eval/{name}/kl"]])
        _interval(axes, distance, value, scorer.colour, "D")
        axes.plot([], [], label=HELD_OUT, marker="D", linestyle="", color=scorer.colour)
        axes.annotate(
            label, (distance, value.low), xytext=(0, -3), textcoords="offset points",
            ha="center", va="top", fontsize=8, color=INK,
        )  # fmt: skip


def _interval(axes: Axes, x: float, value: Interval, colour: str, marker: str) -> None:
    # A bootstrap interval of values that hardly vary can miss their mean by a rounding error.
    below, above = max(value.mean - value.low, 0.0), max(value.high - value.mean, 0.0)
    axes.errorbar(
        [x], [value.mean], yerr=[[below], [above]],
        color=colour, marker=marker, markersize=5, markeredgecolor="white", markeredgewidth=0.7,
        elinewidth=1, capsize=2, zorder=4,
    )  # fmt: skip


def _mark_peak(axes: Axes, scorer: _Scorer, history: History, proxy: Axes | None) -> None:
    kl, scores = column(history, KL, scorer.curve)
    peak = turning_point(scores)
    if peak is None:
        return
    distance = centred(distances_of(kl))[peak]
    for panel in (axes, proxy):
        if panel is not None:
            panel.axvline(distance, color=MUTED, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        f"peak at {distance**2:.1f} nats", (distance, 0.03), xycoords=("data", "axes fraction"),
        xytext=(4, 0), textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip


def _legend(axes: Axes) -> None:
    """Names the marks of the first panel, whose lower right corner a rising curve leaves free."""
    handles: dict[str, Artist] = {}
    for line in axes.lines:
        name = str(line.get_label())
        if name in (RL, BEST_OF_N, HELD_OUT):
            handles[name] = Line2D(
                [], [], label=name, color=line.get_color(), linewidth=line.get_linewidth(),
                linestyle=line.get_linestyle(), marker=line.get_marker(), markersize=4,
            )  # fmt: skip
    if handles:
        axes.legend(handles=[*handles.values()], loc="lower right", frameon=False, fontsize=7)
