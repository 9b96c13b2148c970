"""The figure of several runs: scores against the distance from the SFT model, a colour a run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from plumbline.evaluation.best_of_n import BestOf, read_best_of_n
from plumbline.evaluation.reward_kl import (
    DISTANCE,
    GOLD_CURVE,
    KL,
    SCORERS,
    centred,
    distances_of,
    scorer_curves,
)
from plumbline.evaluation.scores import Interval
from plumbline.evaluation.style import INK, MUTED, History, arms, column, plain, sign

COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#332288", "#E69F00", "#56B4E9", "#882255",
)  # fmt: skip
"""Of Okabe and Ito, and of Tol: apart for the colour-blind, and dark enough for thin lines."""
MARKERS = "oDv^PXp"
"""One fewer than colours, so that runs beyond eight still have a pair of their own."""
NAME_CHARACTERS = 64
WIDE_NAME = 42
"""Longer names leave no room for a second column of the legend."""

OFFSETS = [
    (round(radius * math.cos(math.radians(degrees)), 1),
     round(radius * math.sin(math.radians(degrees)), 1))
    for radius in (14, 20, 28)
    for degrees in (45, 135, 315, 225, 0, 180, 90, 270)
]  # fmt: skip
"""Where a letter may stand beside its point, in points: off the bars, and near, is best."""

RL = "rollouts of RL, smoothed"
HELD_OUT = "one answer, held-out prompts (bars: 95% intervals)"
SFT = "SFT model, one answer"
BEST_OF_N = "best of n answers of the SFT model, at the KL bound"


class RunCurve(NamedTuple):
    """What a run adds to the figure."""

    mark: str
    """A letter that stands beside the run's point."""
    name: str
    history: History
    """A row a rollout; empty where there was no RL."""
    metrics: Mapping[str, float]
    """Of `plumbline.evaluation.compare.compare` and `best_of_n_metrics`."""
    gold_curve: str = GOLD_CURVE
    """The metric of the gold score during training, where it is logged."""


class _Point(NamedTuple):
    """A held-out value at its distance."""

    distance: Interval
    value: Interval


class _Baseline(NamedTuple):
    """What the SFT model is worth, alone and with a pick among n answers."""

    sft: _Point | None
    best_of_n: tuple[tuple[int, _Point], ...]


class _Style(NamedTuple):
    colour: str
    marker: str


def frontier(runs: Sequence[RunCurve], title: str) -> Figure:
    """Scores of several runs against sqrt(KL): above and left of a run is more score for less KL.

    A thin line is a run's training, a marker with a letter its policy on held-out prompts. Squares
    are the best of n answers of the SFT model; they are black where all runs have the same, and
    otherwise have the colour of (the first of) their runs. The panels are those of
    `reward_against_kl`; what a run did not log is left out.

    Args:
        runs: in the order of their colours.
        title: stands above the figure.
    """
    shown = [name for name in SCORERS if name == "score" or any(_has(run, name) for run in runs)]
    styles = [
        _Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(runs))
    ]
    columns = 1 if any(len(run.name) > WIDE_NAME for run in runs) else 2
    lines = math.ceil((len(runs) + 4) / columns)
    size = (6.4, 0.9 + 2.6 * len(shown) + 0.17 * lines)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        _baselines(axes, runs, name, styles)
        for run, style in zip(runs, styles, strict=True):
            _training(axes, run, name, style)
            _draw(axes, _held_out(run, "policy", name), style.colour, style.marker)
        axes.set_ylabel(SCORERS[name])
        plain(axes)
        axes.margins(x=0.06, y=0.14)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel(DISTANCE)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
    figure.legend(
        handles=_handles(runs, styles), loc="outside lower left", ncols=columns, frameon=False,
        fontsize=7,
    )  # fmt: skip
    # Only now is it known where on the page a point stands.
    figure.draw_without_rendering()
    for axes, name in zip(panels, shown, strict=True):
        _letter(axes, runs, name, styles)
    return figure


def _has(run: RunCurve, name: str) -> bool:
    curve = scorer_curves(run.history, run.gold_curve)[name]
    return f"eval/policy/{name}" in run.metrics or any(curve in row for row in run.history)


def _held_out(run: RunCurve, model: str, name: str) -> _Point | None:
    """A model's value on the held-out prompts; None where it is not a number."""
    score, kl = (_estimate(run.metrics, f"eval/{model}/{part}") for part in (name, "kl"))
    if score is None or kl is None:
        return None
    return _Point(Interval(*distances_of(kl)), score)


def _estimate(metrics: Mapping[str, float], name: str) -> Interval | None:
    """A finite metric with its interval, or with one of no width where none was logged."""
    value = metrics.get(name, math.nan)
    found = Interval.read(metrics, name)
    if found is None or not all(map(math.isfinite, found)):
        found = Interval(value, value, value)
    return found if math.isfinite(value) else None


def _baseline(run: RunCurve, name: str) -> _Baseline:
    points = []
    for best in read_best_of_n(run.metrics):
        value: Interval | None = getattr(best, name)
        if value is not None and all(map(math.isfinite, value)):
            points.append((best.n, _Point(_at_bound(best), value)))
    return _Baseline(_held_out(run, "sft", name), tuple(points))


def _at_bound(best: BestOf) -> Interval:
    (distance,) = distances_of([best.kl_bound])
    return Interval(distance, distance, distance)


def _baselines(axes: Axes, runs: Sequence[RunCurve], name: str, styles: Sequence[_Style]) -> None:
    """Each SFT model once, however many runs start from it."""
    colours: dict[_Baseline, str] = {}
    for run, style in zip(runs, styles, strict=True):
        colours.setdefault(_baseline(run, name), style.colour)
    colours.pop(_Baseline(None, ()), None)
    for baseline, colour in colours.items():
        own = colour if len(colours) > 1 else INK
        points = [point for _, point in baseline.best_of_n]
        if baseline.sft:
            _draw(axes, baseline.sft, own, "*")
        if points:
            line = [baseline.sft, *points] if baseline.sft else points
            axes.plot(
                [point.distance.mean for point in line], [point.value.mean for point in line],
                color=own, linewidth=0.9, linestyle=":", zorder=2,
            )  # fmt: skip
        for n, point in baseline.best_of_n:
            _draw(axes, point, own, "s")
            axes.annotate(
                f"{n}", (point.distance.mean, point.value.high), xytext=(0, 3),
                textcoords="offset points", ha="center", fontsize=6, color=own,
            )  # fmt: skip


def _training(axes: Axes, run: RunCurve, name: str, style: _Style) -> None:
    curve = scorer_curves(run.history, run.gold_curve)[name]
    kl, scores = column(run.history, KL, curve)
    if kl:
        axes.plot(
            centred(distances_of(kl)), centred(scores),
            color=style.colour, linewidth=1, alpha=0.75, zorder=3,
        )  # fmt: skip


def _draw(axes: Axes, point: _Point | None, colour: str, marker: str) -> None:
    if point is None:
        return
    axes.errorbar(
        [point.distance.mean], [point.value.mean],
        xerr=arms(point.distance), yerr=arms(point.value),
        color=colour, marker=marker, markersize=8 if marker == "*" else 5.5,
        markeredgecolor="white", markeredgewidth=0.6, elinewidth=0.9, capsize=1.5,
        zorder=5 if marker in MARKERS else 4,
    )  # fmt: skip


def _letter(axes: Axes, runs: Sequence[RunCurve], name: str, styles: Sequence[_Style]) -> None:
    """Write each run's letter beside its point, where it covers least."""
    pixels = axes.figure.dpi / 72
    ends = [
        (run.mark, style.colour, point)
        for run, style in zip(runs, styles, strict=True)
        if (point := _held_out(run, "policy", name))
    ]
    baselines = [_baseline(run, name) for run in runs]
    squares = [point for baseline in baselines for _, point in baseline.best_of_n]
    taken = [
        box for point in (*(end for _, _, end in ends), *squares) for box in _boxes(axes, point)
    ]
    curves = np.concatenate(
        [np.empty((0, 2)), *(axes.transData.transform(line.get_xydata()) for line in axes.lines)]
    )
    letters: list[Bbox] = []
    for mark, colour, point in ends:
        place = (point.distance.mean, point.value.mean)
        spot = axes.transData.transform(place)
        boxes = {offset: _box(spot + np.array(offset) * pixels, 11 * pixels) for offset in OFFSETS}
        costs = {
            offset: box.count_contains(curves)
            + 10 * box.count_overlaps(taken)
            + 100 * box.count_overlaps(letters)
            + 100 * (4 - axes.bbox.count_contains(box.corners()))
            for offset, box in boxes.items()
        }
        best = min(OFFSETS, key=lambda offset: costs[offset])
        letters.append(boxes[best])
        axes.annotate(
            mark, place, xytext=best, textcoords="offset points", ha="center", va="center",
            fontsize=8, fontweight="bold", color=colour, zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _boxes(axes: Axes, point: _Point) -> list[Bbox]:
    """Where a marker and its bars are, in pixels."""
    (x, left, right), (y, low, high) = point.distance, point.value
    spots = axes.transData.transform([(x, y), (left, y), (right, y), (x, low), (x, high)])
    bars = [Bbox.from_extents(*spots[first], *spots[first + 1]) for first in (1, 3)]
    return [_box(spots[0], 8 * axes.figure.dpi / 72), *(bar.padded(1) for bar in bars)]


def _box(centre: np.ndarray, size: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - size / 2, centre[1] - size / 2, size, size)


def _handles(runs: Sequence[RunCurve], styles: Sequence[_Style]) -> list[Line2D]:
    """The legend: the runs, then what the marks are, as far as they are there."""
    handles = [
        Line2D(
            [], [], label=f"{run.mark}  {_shortened(run.name)}", color=style.colour, linewidth=1,
            marker=style.marker, markersize=5,
        )
        for run, style in zip(runs, styles, strict=True)
    ]  # fmt: skip
    if any(KL in row for run in runs for row in run.history):
        handles.append(Line2D([], [], label=RL, color=MUTED, linewidth=1))
    if any(_held_out(run, "policy", name) for run in runs for name in SCORERS):
        handles.append(sign(HELD_OUT, MUTED, "o"))
    if any(_held_out(run, "sft", name) for run in runs for name in SCORERS):
        handles.append(sign(SFT, INK, "*"))
    if any(read_best_of_n(run.metrics) for run in runs):
        handles.append(sign(BEST_OF_N, INK, "s"))
    return handles


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"
