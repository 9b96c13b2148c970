"""Sweeps: their points, their labels, and what is refused, with the exact messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plumbline.errors import ParamsError
from plumbline.params.loader import is_sweep, list_experiments, load_experiment
from plumbline.params.sweep import (
    MOST_POINTS,
    LoadedSweep,
    list_sweeps,
    load_sweep,
    override_text,
)

BASE = "description: The base.\nevaluate:\n  gold: plumbline.evaluation.principles:gold_score\n"
GRID = "sweep:\n  experiment: base\n  grid:\n    rl.kl_coef: [0.0, 0.1]\n    seed: [1, 2]\n"
Load = Callable[..., LoadedSweep]
Faults = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    params = tmp_path / "params"
    params.mkdir()
    (params / "base.yaml").write_text(BASE)
    return params


@pytest.fixture
def load(folder: Path) -> Load:
    """Write `text` as s.yaml, then load it with overrides."""

    def write_and_load(text: str, *overrides: str) -> LoadedSweep:
        (folder / "s.yaml").write_text(text)
        return load_sweep("s", folder, overrides)

    return write_and_load


@pytest.fixture
def faults(load: Load) -> Faults:
    def load_and_fail(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ParamsError) as caught:
            load(text, *overrides)
        return str(caught.value).splitlines()

    return load_and_fail


def listed(points: str) -> str:
    """A sweep over a list of points, one a line."""
    return f"sweep:\n  experiment: base\n  points:\n{points}"


# Points


def test_a_grid_is_every_combination_the_last_key_varying_fastest(load: Load) -> None:
    loaded = load(GRID)
    assert [point.values for point in loaded.points] == [
        {"rl.kl_coef": 0.0, "seed": 1},
        {"rl.kl_coef": 0.0, "seed": 2},
        {"rl.kl_coef": 0.1, "seed": 1},
        {"rl.kl_coef": 0.1, "seed": 2},
    ]
    assert [point.number for point in loaded.points] == [1, 2, 3, 4]
    assert [point.label for point in loaded.points][:2] == [
        "kl_coef=0.0, seed=1",
        "kl_coef=0.0, seed=2",
    ]
    assert loaded.points[2].overrides == ("rl.kl_coef=0.1", "seed=1")
    assert loaded.points[2].experiment.rl.kl_coef == 0.1
    assert loaded.varied == ("rl.kl_coef", "seed")
    assert (loaded.name, loaded.sweep.parallel, loaded.sweep.best.metric) == ("s", 1, "gold")


def test_a_list_of_points_is_taken_as_it_is(load: Load) -> None:
    loaded = load(listed("    - {}\n    - rl.algorithm: grpo\n      seed: 3\n    - {seed: 3}\n"))
    assert [point.label for point in loaded.points] == [
        "as it is",
        "algorithm=grpo, seed=3",
        "seed=3",
    ]
    assert loaded.points[0].overrides == ()
    assert loaded.points[1].experiment.rl.algorithm == "grpo"


def test_labels_say_what_varies_and_in_full_where_ends_are_alike(load: Load) -> None:
    grid = "{sft.epochs: [1, 2], reward_model.epochs: [1, 2], seed: [7]}"
    labels = [point.label for point in load(f"sweep: {{experiment: base, grid: {grid}}}").points]
    assert labels[1] == "sft.epochs=1, reward_model.epochs=2"
    long = "{rl.rewards: [{a.b:c: 0.5, a.b:d: 0.5}, {}]}"
    (label, _) = (p.label for p in load(f"sweep: {{experiment: base, grid: {long}}}").points)
    assert label == 'rewards={"a.b:c": 0.5, "a.b:d":…'


@pytest.mark.parametrize(
    "value",
    [0.05, 1e-5, 3, True, None, "grpo", "1e-4", "null", "a: b #c", " x ", 'quo"te\n', "é", [1, "2"],
     {"m:f": 0.5}, ""],
    ids=repr,
)  # fmt: skip
def test_an_override_reads_back_as_the_same_value(value: Any) -> None:
    from plumbline.params.overrides import parse_override
    from plumbline.params.tree import plain

    read = plain(parse_override(override_text("a.b", value)).node)
    assert read == value
    assert type(read) is type(value)


def test_overrides_change_the_sweep_or_its_experiment_at_every_point(load: Load) -> None:
    loaded = load(GRID, "sweep.parallel=3", "rl.episodes=256", "sweep.best={metric: win_rate}")
    assert loaded.sweep.parallel == 3
    assert loaded.sweep.best.metric == "win_rate"
    assert {point.experiment.rl.episodes for point in loaded.points} == {256}
    assert loaded.points[0].overrides == ("rl.episodes=256", "rl.kl_coef=0.0", "seed=1")


def test_a_list_of_the_grid_can_be_set_and_the_grid_replaced(load: Load) -> None:
    assert len(load(GRID, "sweep.grid.seed=[1, 2, 3]").points) == 6
    assert load(GRID, "sweep.grid={seed: [5]}").points[0].values == {"seed": 5}
    assert load(GRID, "sweep.points=[{seed: 9}]").points[0].values == {"seed": 9}


# Refused


def test_every_fault_is_listed_by_point_as_the_command_line_words_it(
    faults: Faults, folder: Path
) -> None:
    lines = faults(listed("    - {rl.kl_coef: -1}\n    - {rl.klcoef: 1}\n    - {seed: 1}\n"))
    with pytest.raises(ParamsError) as caught:
        load_experiment("base", folder, ["rl.kl_coef=-1"])
    assert lines[0] == f"params/s.yaml: point 1 (kl_coef=-1): {caught.value}"
    assert lines[1].startswith("params/s.yaml: point 2 (klcoef=1): --set rl.klcoef=1: rl.klcoef: ")
    assert "did you mean rl.kl_coef?" in lines[1]
    assert len(lines) == 2


def test_a_fault_of_all_points_is_listed_once(faults: Faults, folder: Path) -> None:
    (folder / "base.yaml").write_text(f"{BASE}rl:\n  gamma: 3\n")
    lines = faults(GRID)
    assert len(lines) == 1
    assert lines[0].startswith("params/s.yaml: every point: params/base.yaml:5: rl.gamma: expected")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sweep:\n  experiment: base\n",
         "params/s.yaml:1: sweep: expected one of grid and points, which say what runs; got "
         "neither"),
        ("sweep:\n  experiment: base\n  grid: {seed: [1]}\n  points: [{seed: 2}]\n",
         "params/s.yaml:3, params/s.yaml:4: sweep: expected one of grid and points, which say what "
         "runs; got both"),
        ("sweep:\n  experiment: base\n  grid:\n    seed: []\n",
         "params/s.yaml:4: sweep.grid.seed: expected a list that is not empty, got []"),
        ("sweep:\n  experiment: base\n  grid:\n    seed: 3\n",
         "params/s.yaml:4: sweep.grid.seed: expected a list that is not empty, got 3"),
        ("sweep:\n  experiment: base\n  grid:\n    seed: [1]\n  paralel: 2\n",
         "params/s.yaml:5: sweep.paralel: unknown key; did you mean sweep.parallel?"),
        ("sweep:\n  grid: {seed: [1]}\n",
         "params/s.yaml:1: sweep.experiment: required and not given; expected a string that is not "
         "empty"),
        ("extends: base.yaml\nsweep:\n  experiment: base\n  grid: {seed: [1]}\n",
         "params/s.yaml:1: extends: a sweep extends no file; sweep.experiment names the experiment "
         "that it varies"),
        ("sweep:\n  experiment: base\n  grid: {seed: [1]}\n  best: {metric: golden}\n",
         "params/s.yaml:4: sweep.best.metric: expected gold, judge, score or win_rate, got "
         '"golden"'),
        ("sweep:\n  experiment: base\n  grid: {seed: [1]}\n  parallel: 0\n",
         "params/s.yaml:4: sweep.parallel: expected an integer >= 1 and <= 64, got 0"),
        ("sweep:\n  experiment: base\n  grid: {seed: [1]}\n  best: {kl_at_most: 0}\n",
         "params/s.yaml:4: sweep.best.kl_at_most: expected a number > 0 or null, got 0"),
        ("sweep:\n  experiment: base\n  points: [3]\n",
         "params/s.yaml:3: sweep.points.0: expected a section of keys, got 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_sweep_is_refused_by_line(faults: Faults, text: str, line: str) -> None:
    assert faults(text) == [line]


def test_an_unknown_experiment_is_named_with_the_nearest(faults: Faults) -> None:
    (line,) = faults("sweep:\n  experiment: bass\n  grid: {seed: [1]}\n")
    assert line.startswith(
        'params/s.yaml:2: sweep.experiment: no experiment "bass"; did you mean base?'
    )


def test_points_that_are_the_same_experiment_are_refused(faults: Faults) -> None:
    points = "    - {rl.kl_coef: 0.05}\n    - {seed: 1}\n    - {seed: 0}\n"
    (line,) = faults(listed(points))
    assert line == (
        "params/s.yaml: points 1 (kl_coef=0.05) and 3 (seed=0) are the same experiment; remove one"
    )


def test_too_many_points_are_counted_and_refused(faults: Faults, load: Load) -> None:
    values = list(range(11))
    (line,) = faults(f"sweep: {{experiment: base, grid: {{seed: {values}, sft.epochs: {values}}}}}")
    assert line.endswith("expected at most 100 points, got 11 × 11 = 121; sweep in several steps")
    most = list(range(MOST_POINTS))
    assert len(load(f"sweep: {{experiment: base, grid: {{seed: {most}}}}}").points) == MOST_POINTS


def test_an_override_that_every_point_would_override_is_refused(faults: Faults, load: Load) -> None:
    assert faults(GRID, "seed=3") == [
        "--set seed=3: seed: every point sets it; set sweep.grid.seed=[…] instead"
    ]
    loaded = load(listed("    - {}\n    - {seed: 1}\n"), "seed=3")
    assert [point.experiment.seed for point in loaded.points] == [3, 1]


@pytest.mark.parametrize(
    ("metric", "needed"),
    [("gold", "a scorer in evaluate.gold"), ("judge", "evaluate.judge=true")],
)
def test_a_rule_about_a_score_that_a_point_lacks_is_refused(
    faults: Faults, metric: str, needed: str
) -> None:
    text = listed("    - {}\n    - {evaluate.gold: null}\n") + f"  best:\n    metric: {metric}\n"
    point = "2 (gold=null)" if metric == "gold" else "1 (as it is)"
    assert faults(text) == [
        f"params/s.yaml:7: sweep.best.metric: {metric} needs {needed}, which point {point} lacks; "
        "set it, or choose score or win_rate"
    ]


# Experiments and sweeps side by side


def test_each_command_names_the_other_for_the_other_kind_of_file(load: Load, folder: Path) -> None:
    load(GRID)
    with pytest.raises(ParamsError) as caught:
        load_experiment("s", folder)
    assert str(caught.value) == (
        "params/s.yaml:1: sweep: this file is a sweep, not an experiment; run it with "
        "`plumbline sweep s`"
    )
    with pytest.raises(
        ParamsError, match=r"params/base\.yaml: .* run it with `plumbline run base`"
    ):
        load_sweep("base", folder)


def test_sweeps_are_listed_apart_from_experiments(load: Load, folder: Path) -> None:
    load(f"description: Two of each.\n{GRID}")
    (folder / "broken.yaml").write_text("sweep: {experiment: gone, grid: {seed: [1]}}")
    assert [item.name for item in list_experiments(folder)] == ["base"]
    broken, good = list_sweeps(folder)
    assert good.description == "base at 4 points of rl.kl_coef, seed: Two of each."
    assert good.error is None
    assert broken.error is not None
    assert "sweep.experiment" in broken.error
    assert is_sweep(good.path)
    assert not is_sweep(folder / "base.yaml")


def test_the_shipped_sweeps_load() -> None:
    params = Path(__file__).resolve().parents[3] / "params"
    sweeps = list_sweeps(params)
    assert "sweep-kl" in [item.name for item in sweeps]
    assert {item.error for item in sweeps} == {None}
