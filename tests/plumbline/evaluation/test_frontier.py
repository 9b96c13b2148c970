"""The figure of several runs: what it draws of each, and where its letters stand."""

import io
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plumbline.evaluation.best_of_n import best_of_n_curve, best_of_n_metrics
from plumbline.evaluation.frontier import (
    BEST_OF_N,
    COLOURS,
    HELD_OUT,
    MARKERS,
    RL,
    SFT,
    RunCurve,
    frontier,
)

PROXY, GOLD, JUDGE = "reward model (proxy)", "gold score", "independent judge"
SCALE = {"score": 1.0, "gold": 0.2, "judge": 0.5}


def best_of_n(seed: int = 0) -> dict[str, float]:
    scores = np.random.default_rng(seed).normal(size=(20, 4))
    return best_of_n_metrics(
        best_of_n_curve(
            scores, gold=scores / 9, judge=scores / 2, bootstrap_samples=100, seed=0
        )
    )  # fmt: skip


def metrics(kl: float, score: float, seed: int = 0) -> dict[str, float]:
    """Held-out metrics of a run; of one seed, runs have one SFT model."""
    values = {
        f"eval/{model}/{name}{end}": value * SCALE.get(name, 1.0) + shift
        for model, worth in (
            ("sft", {"kl": 0.0, "score": -0.1 * seed, "gold": 0.0, "judge": 0.0}),
            ("policy", {"kl": kl, "score": score, "gold": score, "judge": score}),
        )
        for name, value in worth.items()
        for end, shift in (("", 0.0), ("_low", -0.05), ("_high", 0.05))
    }
    return {**values, **best_of_n(seed)}


def history(kl: float, score: float, rollouts: int = 30) -> list[dict[str, float]]:
    return [
        {
            "objective/kl": part * kl,
            "objective/scores": math.sqrt(part) * score,
            "objective/reward_gold_score": math.sqrt(part) * score / 5,
        }
        for part in np.linspace(0, 1, rollouts)
    ]


def run(mark: str, kl: float = 4.0, score: float = 1.0, seed: int = 0) -> RunCurve:
    return RunCurve(mark, f"tiny-{mark}", history(kl, score), metrics(kl, score, seed))


def only(run: RunCurve, *parts: str) -> RunCurve:
    """A run without all metrics that have one of these parts in their names."""
    kept = {k: v for k, v in run.metrics.items() if not any(part in k for part in parts)}
    return run._replace(metrics=kept)


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def letters(axes: Axes) -> dict[str, tuple[float, float]]:
    """Centres of the letters, in pixels of the drawn figure."""
    return {
        text.get_text(): tuple(text.get_window_extent().get_points().mean(0))
        for text in axes.texts
        if text.get_text().isalpha()
    }


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    return [
        tuple(float(v) for v in bar.lines[0].get_xydata()[0])
        for bar in axes.containers
        if bar.lines[0].get_marker() == marker
    ]


def drawn(figure: Figure) -> bool:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue().startswith(b"\x89PNG")


def test_each_run_has_a_line_a_point_and_a_letter_of_its_colour() -> None:
    figure = frontier([run("A", 4, 1), run("B", 9, 1.5)], "Two runs")
    assert list(panels(figure)) == [PROXY, GOLD, JUDGE]
    axes = panels(figure)[PROXY]
    for mark, colour, marker, end in (("A", *style(0), (2, 1)), ("B", *style(1), (3, 1.5))):
        lines = [line for line in axes.lines if line.get_color() == colour]
        assert any(len(line.get_xdata()) == 30 for line in lines)
        assert points(axes, marker) == [pytest.approx(end)]
        assert next(t for t in axes.texts if t.get_text() == mark).get_color() == colour
    assert legend(figure) == ["A  tiny-A", "B  tiny-B", RL, HELD_OUT, SFT, BEST_OF_N]
    assert drawn(figure)


def style(index: int) -> tuple[str, str]:
    return COLOURS[index], MARKERS[index]


def test_a_point_has_its_intervals_both_ways() -> None:
    kl = {"eval/policy/kl_low": 1.0, "eval/policy/kl_high": 9.0}
    only_run = run("A")._replace(metrics={**metrics(4, 1), **kl})
    axes = panels(frontier([only_run], ""))[PROXY]
    (bar,) = (b for b in axes.containers if b.lines[0].get_marker() == MARKERS[0])
    across, along = (segment.get_segments()[0] for segment in bar.lines[2])
    assert across[:, 0].tolist() == pytest.approx([1, 3])
    assert along[:, 1].tolist() == pytest.approx([0.95, 1.05])


def test_one_sft_model_is_drawn_once_and_in_black() -> None:
    axes = panels(frontier([run("A", 4), run("B", 9), run("C", 1)], ""))[PROXY]
    assert len(points(axes, "*")) == 1
    assert len(points(axes, "s")) == 2
    assert {b.lines[0].get_color() for b in axes.containers if b.lines[0].get_marker() == "s"} <= {
        "#1b1f24"
    }


def test_several_sft_models_have_the_colours_of_their_first_runs() -> None:
    axes = panels(frontier([run("A"), run("B", 9), run("C", seed=1)], ""))[PROXY]
    stars = [b.lines[0].get_color() for b in axes.containers if b.lines[0].get_marker() == "*"]
    assert stars == [COLOURS[0], COLOURS[2]]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [((), [PROXY, GOLD, JUDGE]), (("gold",), [PROXY, JUDGE]), (("gold", "judge"), [PROXY])],
)
def test_what_no_run_logged_has_no_panel(missing: tuple[str, ...], expected: list[str]) -> None:
    runs = [only(run("A"), *missing)._replace(history=[]), only(run("B"), *missing, "score")]
    runs = [r._replace(gold_curve="objective/none") for r in runs]
    figure = frontier(runs, "")
    assert list(panels(figure)) == expected
    assert drawn(figure)


def test_runs_of_which_nothing_is_known_are_named_all_the_same() -> None:
    figure = frontier([RunCurve("A", "tiny-A", [], {}), RunCurve("B", "tiny-B", [], {})], "")
    assert legend(figure) == ["A  tiny-A", "B  tiny-B"]
    assert drawn(figure)


def test_what_is_not_a_number_is_not_drawn() -> None:
    broken = {"eval/policy/score": math.nan, "eval/best_of_2/score": math.nan}
    half = {"eval/policy/score_low": math.nan}
    runs = [
        run("A")._replace(metrics={**metrics(4, 1), **broken}),
        run("B")._replace(metrics={**metrics(4, 1), **half}),
    ]
    figure = frontier(runs, "")
    axes = panels(figure)[PROXY]
    assert points(axes, MARKERS[0]) == []
    assert points(axes, MARKERS[1]) == [(2, 1)]
    assert "A" not in letters(axes)
    assert drawn(figure)


def test_letters_of_points_in_one_place_do_not_cover_each_other() -> None:
    figure = frontier([run(mark, 4 + i / 50) for i, mark in enumerate("ABCDEFGH")], "")
    drawn(figure)
    for axes in figure.axes:
        places = [*letters(axes).values()]
        assert len(places) == 8
        apart = [math.dist(a, b) for i, a in enumerate(places) for b in places[:i]]
        # A letter is 8 points wide.
        assert min(apart) > 8 * figure.dpi / 72


def test_a_long_name_is_cut_and_takes_the_width() -> None:
    figure = frontier([run("A")._replace(name="n" * 200)], "")
    assert legend(figure)[0].endswith("n…")
    assert figure.legends[0]._ncols == 1
