"""The figure of over-optimisation: what it shows of each source, and where it sees a peak."""

import io
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plumbline.evaluation.best_of_n import BestOf, best_of_n_curve, kl_bound
from plumbline.evaluation.reward_kl import reward_against_kl, turning_point

PROXY, GOLD, JUDGE = "reward model (proxy)", "gold score", "independent judge"
HELD_OUT = {
    f"eval/{name}/{metric}{end}": value + shift
    for name, values in (
        ("sft", {"kl": 0.0, "score": 0.0, "gold": 0.5, "judge": 0.1}),
        ("policy", {"kl": 9.0, "score": 2.0, "gold": 0.7, "judge": 0.4}),
    )
    for metric, value in values.items()
    for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.2))
}


def over_optimised(rollouts: int = 60, turn: float = 2.0) -> list[dict[str, float]]:
    """The distance grows evenly to 5; gold and judge rise up to `turn`, and fall from there."""
    noise = np.random.default_rng(0).normal(size=(rollouts, 3)) * 0.02
    history = []
    for d, (first, second, third) in zip(np.linspace(0, 5, rollouts), noise, strict=True):
        risen = min(d, 2 * turn - d)
        history.append(
            {
                "episode": 128.0 * (len(history) + 1),
                "objective/kl": d * d,
                "objective/scores": d + first - 1,
                "objective/reward_model": d + first,
                "objective/reward_gold_score": 0.5 + 0.1 * risen + second / 5,
                "objective/judge": 0.5 * risen + third,
            }
        )
    return history


def without(history: list[dict[str, float]], *metrics: str) -> list[dict[str, float]]:
    return [{name: v for name, v in row.items() if name not in metrics} for row in history]


def points(columns: tuple[str, ...] = ("gold", "judge"), answers: int = 8) -> list[BestOf]:
    scores = np.random.default_rng(1).normal(size=(30, answers))
    return best_of_n_curve(
        scores,
        gold=scores / 10 + 0.5 if "gold" in columns else None,
        judge=scores / 2 if "judge" in columns else None,
        bootstrap_samples=100,
        seed=0,
    )


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def drawn(figure: Figure) -> bool:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_each_score_has_a_panel_over_the_same_distance() -> None:
    figure = reward_against_kl(
        over_optimised(), "Reward against distance", best_of_n=points(), held_out=HELD_OUT
    )
    assert figure.get_suptitle() == "Reward against distance"
    assert list(panels(figure)) == [PROXY, GOLD, JUDGE]
    assert "√KL" in figure.axes[-1].get_xlabel()
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert drawn(figure)


def test_the_rollouts_stand_at_the_root_of_their_kl() -> None:
    history = [
        {"objective/kl": kl, "objective/scores": score}
        # The estimate of a KL near 0 can come out negative.
        for kl, score in ((-0.1, 0.0), (1.0, 1.0), (4.0, 2.0))
    ]
    (axes,) = reward_against_kl(history, "").axes
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_proxy_is_the_raw_score_that_best_of_n_picks_by() -> None:
    history = over_optimised(3)
    (axes, *_) = reward_against_kl(history, "").axes
    offsets = np.asarray(axes.collections[0].get_offsets())
    assert offsets[:, 1].tolist() == [row["objective/reward_model"] for row in history]
    (axes, *_) = reward_against_kl(without(history, "objective/reward_model"), "").axes
    offsets = np.asarray(axes.collections[0].get_offsets())
    assert offsets[:, 1].tolist() == [row["objective/scores"] for row in history]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (("objective/reward_gold_score", "objective/judge"), [PROXY]),
        (("objective/reward_gold_score",), [PROXY, JUDGE]),
        (("objective/judge",), [PROXY, GOLD]),
    ],
)
def test_what_was_not_logged_has_no_panel(missing: tuple[str, ...], expected: list[str]) -> None:
    figure = reward_against_kl(without(over_optimised(), *missing), "")
    assert list(panels(figure)) == expected
    assert drawn(figure)


def test_held_out_scores_alone_make_a_panel() -> None:
    held_out = {name: value for name, value in HELD_OUT.items() if "judge" not in name}
    assert list(panels(reward_against_kl([], "", held_out=held_out))) == [PROXY, GOLD]
    assert list(panels(reward_against_kl([], "", best_of_n=points(("judge",))))) == [PROXY, JUDGE]


def test_best_of_n_stands_at_its_bound_with_its_interval() -> None:
    curve = points()
    figure = reward_against_kl([], "dpo", best_of_n=curve)
    for name, column in ((PROXY, "score"), (GOLD, "gold"), (JUDGE, "judge")):
        axes = panels(figure)[name]
        line = axes.lines[0]
        assert list(line.get_xdata()) == [math.sqrt(kl_bound(n)) for n in (1, 2, 4, 8)]
        assert list(line.get_ydata()) == [getattr(point, column).mean for point in curve]
        assert texts(axes) == ["2", "4", "8"]
        last = axes.containers[-1].lines[2][0].get_segments()[0]
        interval = getattr(curve[-1], column)
        assert last[:, 1].tolist() == pytest.approx([interval.low, interval.high])


def test_both_models_stand_at_their_held_out_scores() -> None:
    axes = panels(reward_against_kl([], "", held_out=HELD_OUT))[GOLD]
    assert texts(axes) == ["SFT", "policy"]
    spots = [tuple(bar.lines[0].get_xydata()[0]) for bar in axes.containers]
    assert spots == [(0, 0.5), (3, 0.7)]
    low, high = axes.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.6, 0.9))


def test_scores_that_do_not_vary_can_be_drawn() -> None:
    # The mean lies outside of the interval by a rounding error.
    held_out = {
        f"eval/{name}/{metric}": value
        for name in ("sft", "policy")
        for metric, value in (
            ("kl", 1.0), ("score", 0.1), ("score_low", 0.1 + 1e-16), ("score_high", 0.1 - 1e-16)
        )
    }  # fmt: skip
    assert drawn(reward_against_kl([], "", held_out=held_out))


def test_the_marks_are_named() -> None:
    figure = reward_against_kl(over_optimised(), "", best_of_n=points(), held_out=HELD_OUT)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == 3
    assert ["RL" in names[0], "best of n" in names[1], "held-out" in names[2]] == [True] * 3
    assert all(axes.get_legend() is None for axes in figure.axes[1:])
    only = reward_against_kl(over_optimised(), "").axes[0].get_legend()
    assert only is not None
    assert len(only.get_texts()) == 1


def vertical(axes: Axes) -> list[float]:
    """Where lines go from the bottom to the top of a panel."""
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == ":"]


def test_a_peak_is_marked_where_gold_turns_down() -> None:
    shown = panels(reward_against_kl(over_optimised(turn=2), ""))
    assert vertical(shown[GOLD]) == [pytest.approx(2, abs=0.25)]
    assert vertical(shown[PROXY]) == vertical(shown[GOLD])
    assert vertical(shown[JUDGE]) == [pytest.approx(2, abs=0.25)]
    (label,) = texts(shown[GOLD])
    kl = float(label.removeprefix("peak at ").removesuffix(" nats"))
    assert kl == pytest.approx(vertical(shown[GOLD])[0] ** 2, abs=0.06)


def test_no_peak_is_marked_where_nothing_turns_down() -> None:
    shown = panels(reward_against_kl(over_optimised(turn=5), ""))
    assert [vertical(axes) for axes in shown.values()] == [[], [], []]


def test_a_peak_of_the_proxy_is_not_marked() -> None:
    history = [
        {**row, "objective/reward_model": row["objective/judge"], "objective/judge": 0.0}
        for row in over_optimised()
    ]
    figure = reward_against_kl(without(history, "objective/reward_gold_score"), "")
    assert [vertical(axes) for axes in figure.axes] == [[], []]


def test_gold_may_have_another_name() -> None:
    history = [
        {**row, "objective/reward_principles": row["objective/reward_gold_score"]}
        for row in over_optimised()
    ]
    history = without(history, "objective/reward_gold_score")
    assert GOLD not in panels(reward_against_kl(history, ""))
    assert GOLD in panels(reward_against_kl(history, "", gold_curve="objective/reward_principles"))


def test_little_can_be_drawn() -> None:
    assert drawn(reward_against_kl(over_optimised(1), "one rollout"))
    assert drawn(reward_against_kl(over_optimised(2), "two rollouts", best_of_n=points(answers=1)))


def noisy(values: np.ndarray, seed: int, noise: float = 0.1) -> list[float]:
    drawn_noise = np.random.default_rng(seed).normal(size=len(values)) * noise
    return [float(value) for value in values + drawn_noise]


def test_turning_points_are_found_in_noise() -> None:
    x = np.linspace(0, 1, 50)
    for seed in range(20):
        found = turning_point(noisy(1 - 4 * (x - 0.4) ** 2, seed))
        assert found is not None
        assert abs(x[found] - 0.4) < 0.15


def test_noise_alone_is_no_turn() -> None:
    flat, rising = np.zeros(50), np.minimum(np.linspace(0, 3, 50), 1)
    turns = [turning_point(noisy(curve, seed)) for seed in range(50) for curve in (flat, rising)]
    assert sum(turn is not None for turn in turns) <= 2


def test_a_few_values_do_not_turn() -> None:
    assert turning_point([0.0, 9.0, 0.0, 0.0]) is None
    assert turning_point([]) is None


def test_values_that_do_not_vary_do_not_turn() -> None:
    # Smoothed, they differ by rounding errors.
    assert [turning_point([0.1] * size) for size in (10, 20, 50)] == [None] * 3
