"""The figures of a run: training curves, and reward against the distance from the reference."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

History = Sequence[Mapping[str, float]]
"""The metrics of each rollout, in order; `episode` is among them."""

INK, ACCENT, SECOND, MUTED = "#1b1f24", "#0b6e99", "#d1495b", "#8a939c"

PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", (("objective/scores", "score"), ("objective/rlhf_reward", "score − β·KL"))),
    ("KL to the reference (nats a response)", (("objective/kl", ""),)),
    ("Entropy (nats a token)", (("policy/entropy_avg", ""),)),
    ("Response length (tokens)", (("response/length_mean", ""),)),
    ("Policy loss", (("loss/policy_avg", ""),)),
    ("Value loss", (("loss/value_avg", ""),)),
    ("Clip fraction", (("policy/clipfrac_avg", "policy"), ("val/clipfrac_avg", "value"))),
    ("Explained variance of the critic", (("val/explained_var", ""),)),
)


def curves(history: History, title: str) -> Figure:
    """Small multiples of the RL metrics over episodes."""
    figure = Figure(figsize=(13, 6), layout="constrained", dpi=110)
    episodes = [row["episode"] for row in history]
    for axes, (name, lines) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        for (metric, label), colour in zip(lines, (ACCENT, SECOND), strict=False):
            values = [row[metric] for row in history]
            axes.plot(episodes, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(episodes, smooth(values), color=colour, linewidth=1.8, label=label)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        _plain(axes)
    figure.supxlabel("episodes", fontsize=10, color=INK)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", color=INK)
    return figure


def reward_against_kl(history: History, title: str) -> Figure:
    """Score against sqrt(KL), where over-optimisation shows (Gao et al. 2022, fig. 1)."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=110)
    axes = figure.subplots()
    # The estimate of a KL near 0 can come out negative.
    distances = [math.sqrt(max(row["objective/kl"], 0.0)) for row in history]
    scores = [row["objective/scores"] for row in history]
    axes.plot(smooth(distances), smooth(scores), color=MUTED, linewidth=1, zorder=1)
    points = axes.scatter(
        distances, scores, c=[row["episode"] for row in history], cmap="viridis", s=22, zorder=2
    )
    bar = figure.colorbar(points, ax=axes, label="episodes")
    bar.outline.set_visible(False)
    axes.set_xlabel("√KL(policy ‖ reference), √nats a response")
    axes.set_ylabel("reward-model score")
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    _plain(axes)
    return figure


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
    _plain(axes)
    return figure


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average without the start's bias: weight 0 leaves the values alone."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
