"""The figures: their titles, their lines, and that they can be drawn."""

import io
import math

import pytest
from matplotlib.figure import Figure

from plumbline.evaluation.plots import (
    PANELS,
    curves,
    reward_against_kl,
    score_histogram,
    smooth,
)

HISTORY = [
    {
        "episode": 8.0 * step,
        **{metric: step / 10 for _, lines in PANELS for metric, _ in lines},
        # The estimate of a KL near 0 can come out negative.
        "objective/kl": [-0.1, 1.0, 4.0][step - 1],
        "objective/scores": [0.0, 1.0, 2.0][step - 1],
    }
    for step in (1, 2, 3)
]


def drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def test_curves_have_a_panel_for_each_metric() -> None:
    figure = curves(HISTORY, "quickstart: ppo")
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == "quickstart: ppo"
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Reward",
        "KL to the reference (nats a response)",
        "Entropy (nats a token)",
        "Response length (tokens)",
        "Policy loss",
        "Value loss",
        "Clip fraction",
        "Explained variance of the critic",
    ]
    assert figure.get_supxlabel() == "episodes"
    assert drawn(figure).startswith(b"\x89PNG")


def test_curves_show_the_values_over_episodes() -> None:
    panels = {axes.get_title(loc="left"): axes for axes in curves(HISTORY, "").axes}
    raw = panels["KL to the reference (nats a response)"].lines[0]
    assert list(raw.get_xdata()) == [8, 16, 24]
    assert list(raw.get_ydata()) == [-0.1, 1, 4]
    legend = panels["Reward"].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["score", "score − β·KL"]
    assert panels["Policy loss"].get_legend() is None


def test_reward_against_the_root_of_the_kl() -> None:
    figure = reward_against_kl(HISTORY, "Reward against distance")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Reward against distance"
    assert axes.collections[0].get_offsets().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert "√KL" in axes.get_xlabel()
    assert drawn(figure).startswith(b"\x89PNG")


def test_score_histogram_counts_each_group() -> None:
    figure = score_histogram({"rejected": [0.0, 1.0, 1.0], "chosen": [3.0]}, "Scores", "score")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Scores"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("score", "responses")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["rejected", "chosen"]
    assert sum(patch.get_height() for patch in axes.patches) == 4
    assert drawn(figure).startswith(b"\x89PNG")


def test_one_rollout_can_be_drawn() -> None:
    assert drawn(curves(HISTORY[:1], "one"))
    assert drawn(reward_against_kl(HISTORY[:1], "one"))


def test_smoothing_by_hand() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    assert smooth([1.0, 2.0], weight=0.0) == [1, 2]
    # (0.5 * 0.5 * 1 + 0.5 * 2) / 0.75.
    assert smooth([1.0, 2.0], weight=0.5) == pytest.approx([1, 5 / 3])
    assert smooth([]) == []
    assert not any(math.isnan(value) for value in smooth([1.0] * 100))
