"""The figure of a sweep: held-out scores of its points against their KL."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Bbox

from plumbline.evaluation.best import KL, METRICS, SweepPoint
from plumbline.evaluation.scores import Interval
from plumbline.evaluation.style import ACCENT, INK, MUTED, SECOND, arms, plain, sign

PANELS = {"score": "reward model (proxy)", "gold": "gold score", "judge": "independent judge"}
MOST_CHARACTERS = 100
"""Where all labels have more, the points have numbers, which the table explains."""
FAR = 1.6
"""A budget further out than so many times the furthest point is named, not drawn."""


class _Mark(NamedTuple):
    """A point as it is drawn: the square root of its KL, and its score."""

    text: str
    distance: Interval
    value: Interval
    best: bool
    within: bool


def sweep_frontier(
    points: Sequence[SweepPoint],
    title: str,
    *,
    best: int | None = None,
    kl_at_most: float | None = None,
) -> Figure:
    """Held-out scores against the KL, a marker a point; the x axis is even in sqrt(KL).

    The proxy, which training follows, and each independent score that any point has, have a panel
    of their own. A line joins the points that no other beats at a smaller KL. Points beyond the
    budget are pale.

    Args:
        points: at least one.
        title: stands above the figure.
        best: number of the point that gets a ring.
        kl_at_most: the budget, nats a response.
    """
    shown = [
        name
        for name in PANELS
        if name == "score" or any(METRICS[name][0] in point.metrics for point in points)
    ]
    figure = Figure(figsize=(6.4, 1.3 + 2.7 * len(shown)), layout="constrained", dpi=150)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    furthest = max(_distance(point.metrics[KL]) for point in points)
    budget = None if kl_at_most is None else _distance(kl_at_most)
    drawn = budget is not None and budget <= FAR * max(furthest, 1e-9)
    marks = {name: _marks(points, name, best, kl_at_most) for name in shown}
    for axes, name in zip(panels, shown, strict=True):
        colour = ACCENT if name == "score" else SECOND
        plain(axes)
        _frontier(axes, marks[name])
        _sft(axes, points, name)
        for mark in marks[name]:
            _draw(axes, mark, colour)
        if budget is not None and drawn:
            axes.axvline(budget, color=MUTED, linewidth=1, linestyle="--", zorder=1)
        axes.set_ylabel(PANELS[name])
        axes.margins(x=0.08, y=0.16)
    bars = max(_distances(point.metrics, KL).high for point in points)
    _nats(panels[-1], max(bars, budget or 0.0 if drawn else 0.0))
    beyond = f"; all are within the budget of {kl_at_most:g}" if budget and not drawn else ""
    panels[-1].set_xlabel(f"KL(policy ‖ SFT), nats a response{beyond}")
    figure.align_ylabels(panels)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK)
    figure.legend(
        handles=_handles(marks, best, kl_at_most if drawn else None, _numbered(points)),
        loc="outside lower left", ncols=2, frameon=False, fontsize=7,
    )  # fmt: skip
    # Only now is it known where on the page a point stands.
    figure.draw_without_rendering()
    for axes, name in zip(panels, shown, strict=True):
        _label(axes, marks[name])
    return figure


def _distance(kl: float) -> float:
    # The estimate of a KL near 0 can come out negative.
    return math.sqrt(max(kl, 0.0))


def _estimate(metrics: Mapping[str, float], name: str) -> Interval:
    """A metric with its interval, or with one of no width where none was logged."""
    value = metrics[name]
    return Interval(value, metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value))


def _distances(metrics: Mapping[str, float], name: str) -> Interval:
    return Interval(*(_distance(value) for value in _estimate(metrics, name)))


def _marks(
    points: Sequence[SweepPoint], name: str, best: int | None, kl_at_most: float | None
) -> list[_Mark]:
    metric, _ = METRICS[name]
    return [
        _Mark(
            str(point.number) if _numbered(points) else point.label,
            _distances(point.metrics, KL),
            _estimate(point.metrics, metric),
            point.number == best,
            kl_at_most is None or point.metrics[KL] <= kl_at_most,
        )
        for point in points
        if math.isfinite(point.metrics.get(metric, math.nan))
    ]


def _numbered(points: Sequence[SweepPoint]) -> bool:
    return sum(len(point.label) for point in points) > MOST_CHARACTERS


def _frontier(axes: Axes, marks: Sequence[_Mark]) -> None:
    reached: list[_Mark] = []
    for mark in sorted(marks, key=lambda m: (m.distance.mean, -m.value.mean)):
        if not reached or mark.value.mean > reached[-1].value.mean:
            reached.append(mark)
    axes.plot(
        [mark.distance.mean for mark in reached], [mark.value.mean for mark in reached],
        color=MUTED, linewidth=1, zorder=2,
    )  # fmt: skip


def _sft(axes: Axes, points: Sequence[SweepPoint], name: str) -> None:
    """The SFT model that the points start from; several where they have different ones."""
    metric = f"eval/sft/{name}"
    for value in dict.fromkeys(
        _estimate(point.metrics, metric) for point in points if metric in point.metrics
    ):
        _bars(axes, Interval(0.0, 0.0, 0.0), value, INK, "*", 8)


def _draw(axes: Axes, mark: _Mark, colour: str) -> None:
    _bars(axes, mark.distance, mark.value, colour, "o", 6, 1.0 if mark.within else 0.4)
    if mark.best:
        axes.plot(
            [mark.distance.mean], [mark.value.mean], marker="o", markersize=13, color=INK,
            markerfacecolor="none", markeredgewidth=1.3, linestyle="", zorder=5,
        )  # fmt: skip


def _bars(
    axes: Axes, x: Interval, y: Interval, colour: str, marker: str, size: float, alpha: float = 1
) -> None:
    axes.errorbar(
        [x.mean], [y.mean], xerr=arms(x), yerr=arms(y), color=colour, marker=marker,
        markersize=size, markeredgecolor="white", markeredgewidth=0.6, elinewidth=0.9, capsize=1.5,
        alpha=alpha, linestyle="", zorder=4,
    )  # fmt: skip


def _nats(axes: Axes, furthest: float) -> None:
    """Ticks in nats, far enough from each other, on an axis of square roots."""
    steps = [factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5)]
    ticks = [0.0]
    for kl in steps:
        if _distance(kl) > furthest * 1.05:
            break
        if _distance(kl) - _distance(ticks[-1]) > furthest / 9:
            ticks.append(kl)
    axes.xaxis.set_major_locator(FixedLocator([_distance(kl) for kl in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{kl:g}" for kl in ticks])


def _handles(
    marks: Mapping[str, Sequence[_Mark]], best: int | None, budget: float | None, numbered: bool
) -> list[Line2D]:
    """What the marks are, as far as they are there."""
    point = "policy, numbered as in the table" if numbered else "policy, held-out prompts"
    handles = [
        sign(f"{point} (95% intervals)", INK, "o"),
        sign("SFT model", INK, "*"),
        Line2D([], [], label="not beaten at a smaller KL", color=MUTED, linewidth=1),
    ]
    if best is not None:
        ring = sign("best point", INK, "o")
        ring.set(markerfacecolor="none", markersize=9)
        handles.append(ring)
    if budget is not None:
        label = f"KL budget, {budget:g} nats"
        if any(not mark.within for panel in marks.values() for mark in panel):
            label += "; points beyond it are pale"
        handles.append(Line2D([], [], label=label, color=MUTED, linewidth=1, linestyle="--"))
    return handles


def _label(axes: Axes, marks: Sequence[_Mark]) -> None:
    """Write beside each marker what its point is, where nothing else stands."""
    if not marks:
        return
    spots = axes.transData.transform([(m.distance.mean, m.value.mean) for m in marks])
    pixels = axes.figure.dpi / 72
    taken = [
        Bbox.from_bounds(x - 4 * pixels, y - 4 * pixels, 8 * pixels, 8 * pixels) for x, y in spots
    ]
    for mark in marks:
        places = [_written(axes, mark, *place) for place in _PLACES]
        free = [
            text
            for text in places
            if not (box := text.get_window_extent()).count_overlaps(taken)
            and axes.bbox.count_contains(box.corners()) == 4
        ]
        chosen = free[0] if free else places[0]
        for text in places:
            if text is not chosen:
                text.remove()
        taken.append(chosen.get_window_extent())


_PLACES = (
    (7, -8, "left"), (-7, 8, "right"), (7, 8, "left"), (-7, -8, "right"),
    (7, -18, "left"), (-7, 18, "right"), (7, 18, "left"), (-7, -18, "right"),
)  # fmt: skip
"""Where a label may stand, in points from its marker, the best place first: off the bars, and off
a line that rises."""
_HALO = [withStroke(linewidth=2, foreground="white")]


def _written(axes: Axes, mark: _Mark, x: float, y: float, side: str) -> Annotation:
    return axes.annotate(
        mark.text, (mark.distance.mean, mark.value.mean), xytext=(x, y),
        textcoords="offset points", ha=side, va="center", fontsize=7,
        fontweight="bold" if mark.best else "normal", color=INK, zorder=6,
        path_effects=_HALO,
    )  # fmt: skip
