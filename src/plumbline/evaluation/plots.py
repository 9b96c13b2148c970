"""The figures of trainings and reward models: curves, distributions, calibration."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from plumbline.evaluation.scores import CalibrationBin, expected_calibration_error
from plumbline.evaluation.style import (
    ACCENT,
    INK,
    MUTED,
    SECOND,
    History,
    column,
    plain,
    smooth,
)

Panel = tuple[str, tuple[tuple[str, str], ...]]
"""A title, and the lines under it: metric and label."""

PANELS: tuple[Panel, ...] = (
    ("Reward", (("objective/scores", "score"), ("objective/rlhf_reward", "score − β·KL"))),
    ("KL to the reference (nats a response)", (("objective/kl", ""),)),
    ("Entropy (nats a token)", (("policy/entropy_avg", ""),)),
    ("Response length (tokens)", (("response/length_mean", ""),)),
    ("Policy loss", (("loss/policy_avg", ""),)),
    ("Value loss", (("loss/value_avg", ""),)),
    ("Clip fraction", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value"))),
    ("Explained variance of the critic", (("val/explained_var", ""),)),
    ("KL loss (nats a token)", (("loss/kl_avg", ""),)),
    ("Score of the judge", (("objective/judge", ""),)),
)
SPARE_PANELS: tuple[Panel, ...] = (
    ("Share of responses cut at the limit", (("response/clipped_fraction", ""),)),
    ("KL by k3 (nats a response)", (("objective/kl_k3", ""),)),
    ("Largest probability ratio", (("policy/ratio_max", ""),)),
)
"""Drawn only where they fill a row that is begun."""
DPO_PANELS: tuple[Panel, ...] = (
    ("Loss (nats a pair)", (("dpo/loss", ""),)),
    ("Accuracy of the implicit reward", (("dpo/accuracy", ""),)),
    ("Margin, chosen − rejected", (("dpo/margin", ""),)),
    (
        "Implicit reward β·(log π − log ref)",
        (("dpo/chosen_reward", "chosen"), ("dpo/rejected_reward", "rejected")),
    ),
)
WIDTH = 4
"""Panels in a row."""


def curves(history: History, title: str) -> Figure:
    """Small multiples of the RL metrics over episodes; what was not logged gets no panel.

    Args:
        history: a row a rollout, with `episode`.
        title: stands above the figure.
    """
    logged = {metric for row in history for metric in row}
    functions = tuple(
        (f"Reward function {metric.removeprefix('objective/reward_')}", ((metric, ""),))
        for metric in sorted(logged)
        if metric.startswith("objective/reward_") and metric != "objective/reward_model"
    )
    panels = _drawable(PANELS + functions, logged)
    spare = _drawable(SPARE_PANELS, logged)
    return _multiples(history, [*panels, *spare[: -len(panels) % WIDTH]], "episode", title)


def dpo_curves(history: History, title: str) -> Figure:
    """Small multiples of DPO's metrics over optimizer steps.

    Args:
        history: a row a step, with `step`.
        title: stands above the figure.
    """
    logged = {metric for row in history for metric in row}
    return _multiples(history, _drawable(DPO_PANELS, logged), "step", title)


def score_histogram(groups: Mapping[str, Sequence[float]], title: str, label: str) -> Figure:
    """Distributions of scores, one colour a group."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots()
    everything = [value for values in groups.values() for value in values]
    span = (min(everything), max(everything))
    for (name, values), colour in zip(groups.items(), (MUTED, ACCENT, SECOND), strict=False):
        axes.hist(values, bins=30, range=span, color=colour, alpha=0.65, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("responses")
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    plain(axes)
    return figure


def calibration_plot(
    bins: Sequence[CalibrationBin], title: str, *, stated: str, outcome: str
) -> Figure:
    """Reliability diagram: what a reward model states against what came true.

    Args:
        bins: at least one.
        title: stands above the figure.
        stated: label of the stated probability, for example "confidence σ(|margin|)".
        outcome: label of the share that came true, for example "share ordered right".
    """
    figure = Figure(figsize=(4.8, 5.2), layout="constrained", dpi=110)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    # Confidence in a pair starts at a half, the probability of a label at 0.
    start = 0.5 if min(part.low for part in bins) >= 0.5 else 0.0
    shares = np.array([part.share for part in bins])
    axes.plot([start, 1], [start, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
    axes.errorbar(
        [part.stated for part in bins],
        shares[:, 0],
        yerr=np.abs(shares[:, 1:] - shares[:, :1]).T,
        color=ACCENT, marker="o", markersize=5, linewidth=1.6, elinewidth=1, capsize=2,
    )  # fmt: skip
    total = sum(part.size for part in bins)
    axes.legend(
        title=f"ECE {expected_calibration_error(bins):.3f}, N = {total:,}",
        frameon=False, fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip
    axes.set_ylabel(outcome)
    axes.set_ylim(min(start, shares[:, 1].min()) - 0.02, 1.02)
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    bars = below.bar(
        [part.low for part in bins],
        [part.size for part in bins],
        width=[part.high - part.low for part in bins],
        align="edge", color=ACCENT, alpha=0.35, edgecolor="white",
    )  # fmt: skip
    below.bar_label(bars, fontsize=7, color=INK, padding=1)
    below.margins(y=0.25)
    below.set_ylabel("count")
    below.set_xlabel(stated)
    below.set_xlim(start - 0.01, 1.01)
    for part in (axes, below):
        plain(part)
    below.xaxis.set_major_locator(MultipleLocator((1 - start) / 5))
    return figure


def _drawable(panels: Sequence[Panel], logged: set[str]) -> list[Panel]:
    """The panels and lines that there are values for."""
    kept = ((name, tuple(line for line in lines if line[0] in logged)) for name, lines in panels)
    return [panel for panel in kept if panel[1]]


def _multiples(history: History, panels: Sequence[Panel], x: str, title: str) -> Figure:
    columns = min(WIDTH, max(len(panels), 1))
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(3.25 * columns, 3.0 * rows), layout="constrained", dpi=110)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, lines) in zip(grid, panels, strict=False):
        for (metric, label), colour in zip(lines, (ACCENT, SECOND), strict=False):
            steps, values = column(history, x, metric)
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        plain(axes)
    for axes in grid[len(panels) :]:
        figure.delaxes(axes)
    figure.supxlabel(f"{x}s", fontsize=10, color=INK)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", color=INK)
    return figure
