"""The figure of a sweep: what it shows of each point."""

import io
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plumbline.evaluation.best import SweepPoint
from plumbline.evaluation.sweep_frontier import sweep_frontier

PROXY, GOLD, JUDGE = "reward model (proxy)", "gold score", "independent judge"


def point(number: int, kl: float, gold: float, **more: float) -> SweepPoint:
    values = {"sft/kl": 0.0, "sft/score": -1.0, "sft/gold": 0.5}
    values |= {"policy/kl": kl, "policy/score": math.sqrt(max(kl, 0)), "policy/gold": gold, **more}
    metrics = {
        f"eval/{name}{end}": value + shift
        for name, value in values.items()
        for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    }
    return SweepPoint(number, f"kl_coef={number}", metrics)


POINTS = [point(1, 16.0, 0.6), point(2, 9.0, 0.9), point(3, 4.0, 0.8), point(4, -0.01, 0.55)]


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def markers(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """Where markers of a kind stand, with those of the error bars."""
    return sorted(
        (float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0]))
        for line in axes.lines
        if line.get_marker() == marker and len(np.asarray(line.get_xdata())) == 1
    )


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(figure: Figure) -> bool:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_every_point_has_a_marker_at_the_root_of_its_kl_in_every_panel() -> None:
    figure = sweep_frontier(POINTS, "Title")
    assert list(panels(figure)) == [PROXY, GOLD]
    assert markers(panels(figure)[GOLD], "o") == [(0.0, 0.55), (2.0, 0.8), (3.0, 0.9), (4.0, 0.6)]
    assert markers(panels(figure)[GOLD], "*") == [(0.0, 0.5)]
    assert drawn(figure)


def test_a_judge_has_a_panel_where_any_point_has_one() -> None:
    extra = point(5, 1.0, 0.5, **{"policy/judge": 0.3, "sft/judge": 0.1})
    figure = sweep_frontier([*POINTS, extra], "Title")
    assert markers(panels(figure)[JUDGE], "o") == [(1.0, 0.3)]


def test_the_best_point_has_a_ring_and_the_budget_a_line() -> None:
    figure = sweep_frontier(POINTS, "Title", best=3, kl_at_most=6.25)
    for axes in figure.axes:
        rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert [float(np.asarray(ring.get_xdata())[0]) for ring in rings] == [2.0]
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [float(np.asarray(line.get_xdata())[0]) for line in dashed] == [2.5]
    assert "KL budget, 6.25 nats; points beyond it are pale" in legend(figure)
    assert "best point" in legend(figure)


def test_points_beyond_the_budget_are_pale() -> None:
    figure = sweep_frontier(POINTS, "Title", kl_at_most=6.25)
    alphas: dict[float, Any] = {
        float(np.asarray(line.get_xdata())[0]): line.get_alpha()
        for line in panels(figure)[GOLD].lines
        if line.get_marker() == "o"
    }
    assert [alphas[x] for x in (0.0, 2.0, 3.0, 4.0)] == [1.0, 1.0, 0.4, 0.4]


def test_a_budget_far_beyond_all_points_is_named_on_the_axis() -> None:
    figure = sweep_frontier(POINTS, "Title", kl_at_most=100.0)
    assert figure.axes[-1].get_xlabel().endswith("all are within the budget of 100")
    assert not [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]


def test_the_line_joins_what_is_not_beaten_at_a_smaller_kl() -> None:
    figure = sweep_frontier(POINTS, "Title")
    (line,) = [line for line in panels(figure)[GOLD].lines if len(np.asarray(line.get_xdata())) > 2]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [
        (0.0, 0.55), (2.0, 0.8), (3.0, 0.9),
    ]  # fmt: skip


def test_the_axis_is_in_nats() -> None:
    axes = sweep_frontier(POINTS, "Title").axes[-1]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    ticks = dict(zip(labels, axes.get_xticks(), strict=True))
    assert ticks["0"] == 0
    assert ticks["10"] == pytest.approx(math.sqrt(10))


def test_labels_stand_apart_from_each_other() -> None:
    near = [point(n, 4 + n / 50, 0.8 + n / 500) for n in range(1, 5)]
    figure = sweep_frontier(near, "Title")
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == [p.label for p in near]
        assert sum(box.count_overlaps(boxes) for box in boxes) == len(boxes)


def test_many_points_have_numbers_and_one_point_will_do() -> None:
    many = [point(n, float(n), 0.5 + n / 100) for n in range(1, 14)]
    figure = sweep_frontier(many, "Title")
    assert figure.axes[0].texts[2].get_text() == "3"
    assert any("numbered as in the table" in text for text in legend(figure))
    assert drawn(sweep_frontier(POINTS[3:], "Title", best=4, kl_at_most=1.0))
