"""The figures: their titles, their lines, and that they can be drawn."""

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from plumbline.evaluation.plots import calibration_plot, curves, dpo_curves, score_histogram
from plumbline.evaluation.scores import label_calibration, pair_calibration

WITHOUT_CRITIC = (
    "objective/scores", "objective/rlhf_reward", "objective/kl", "policy/entropy_avg",
    "response/length_mean", "loss/policy_avg", "policy/clipfrac_avg",
    # Always logged, and not always shown.
    "objective/reward_model", "objective/kl_k3", "response/clipped_fraction", "policy/ratio_max",
)  # fmt: skip
PPO = (*WITHOUT_CRITIC, "loss/value_avg", "val/clipfrac_avg", "val/explained_var")


def history_of(*metrics: str) -> list[dict[str, float]]:
    return [{"episode": 8.0 * step, **dict.fromkeys(metrics, step / 10)} for step in (1, 2, 3)]


HISTORY = [
    {**row, "objective/kl": kl} for row, kl in zip(history_of(*PPO), (-0.1, 1.0, 4.0), strict=True)
]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def test_curves_have_a_panel_for_each_metric() -> None:
    figure = curves(HISTORY, "quickstart: ppo")
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == "quickstart: ppo"
    assert titles(figure) == [
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


def test_without_a_critic_other_panels_take_the_place_of_its_own() -> None:
    figure = curves(history_of(*WITHOUT_CRITIC), "rloo")
    assert titles(figure) == [
        "Reward",
        "KL to the reference (nats a response)",
        "Entropy (nats a token)",
        "Response length (tokens)",
        "Policy loss",
        "Clip fraction",
        "Share of responses cut at the limit",
        "KL by k3 (nats a response)",
    ]
    clip_fraction = figure.axes[5]
    assert len(clip_fraction.lines) == 2
    assert clip_fraction.get_legend() is None


def test_the_kl_loss_the_judge_and_reward_functions_have_panels() -> None:
    figure = curves(
        history_of(
            *WITHOUT_CRITIC, "loss/kl_avg", "objective/judge", "objective/reward_short",
            "objective/reward_gold_score",
        ),
        "grpo",
    )  # fmt: skip
    assert titles(figure)[6:] == [
        "KL loss (nats a token)",
        "Score of the judge",
        "Reward function gold_score",
        "Reward function short",
        "Share of responses cut at the limit",
        "KL by k3 (nats a response)",
    ]
    assert drawn(figure)


def test_values_that_are_missing_or_no_numbers_are_left_out() -> None:
    history = history_of(*PPO, "objective/judge")
    del history[0]["objective/judge"]
    history[1]["val/explained_var"] = math.nan
    shown = dict(zip(titles(figure := curves(history, "")), figure.axes, strict=True))
    assert list(shown["Score of the judge"].lines[0].get_xdata()) == [16, 24]
    explained = shown["Explained variance of the critic"]
    assert list(explained.lines[0].get_xdata()) == [8, 24]
    assert np.isfinite(np.asarray(explained.lines[1].get_ydata())).all()


def test_dpo_has_curves_over_steps() -> None:
    rewards = {"dpo/chosen_reward": 0.1, "dpo/rejected_reward": -0.2}
    rows = [
        {"step": 2.0 * step, "dpo/loss": 0.7 / step, "dpo/accuracy": 0.5, "dpo/margin": 0.3}
        | rewards
        for step in (1, 2, 3)
    ]
    figure = dpo_curves(rows, "dpo, beta 0.1")
    assert titles(figure) == [
        "Loss (nats a pair)",
        "Accuracy of the implicit reward",
        "Margin, chosen − rejected",
        "Implicit reward β·(log π − log ref)",
    ]
    assert figure.get_supxlabel() == "steps"
    assert list(figure.axes[0].lines[0].get_xdata()) == [2, 4, 6]
    legend = figure.axes[3].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["chosen", "rejected"]
    assert figure.axes[3].lines[2].get_ydata()[0] == -0.2
    assert drawn(figure)


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


def test_calibration_shows_shares_intervals_and_counts() -> None:
    sure = math.log(3.2)
    bins = pair_calibration([sure, sure, sure, -sure, 5.0])
    figure = calibration_plot(bins, "Calibration", stated="confidence", outcome="share right")
    above, below = figure.axes
    assert above.get_title(loc="left") == "Calibration"
    assert (below.get_xlabel(), above.get_ylabel()) == ("confidence", "share right")
    spots = above.containers[0].lines[0].get_xydata()
    assert spots[0].tolist() == pytest.approx([3.2 / 4.2, 0.75])
    bar = above.containers[0].lines[2][0].get_segments()[0]
    # Wilson's interval of 3 out of 4.
    assert bar[:, 1].tolist() == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert [patch.get_height() for patch in below.patches] == [4, 1]
    assert [text.get_text() for text in below.texts] == ["4", "1"]
    legend = above.get_legend()
    assert legend is not None
    # |0.75 - 0.762| * 4/5 + |1 - sigmoid(5)| / 5.
    assert legend.get_title().get_text() == "ECE 0.011, N = 5"
    assert below.get_xlim() == pytest.approx((0.49, 1.01))
    assert drawn(figure)


def test_calibration_of_labels_starts_at_nought() -> None:
    bins = label_calibration([-2.0, 0.0, 2.0], [False, True, True])
    figure = calibration_plot(bins, "", stated="P(good)", outcome="share good")
    assert figure.axes[1].get_xlim() == pytest.approx((-0.01, 1.01))
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1]
    assert drawn(figure)


def test_one_rollout_can_be_drawn() -> None:
    assert drawn(curves(HISTORY[:1], "one"))
