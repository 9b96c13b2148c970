"""Tests of flows.reproducing.agreement: what counts as the same, and what is said of the rest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from flows.reproducing.agreement import Agreement, compare, show
from tasks.keys import Ingredients
from tasks.past_runs import PastRun, PastStep
from tasks.records import write_ingredients


def past_run(
    steps: dict[str, PastStep],
    metrics: dict[str, float] | None = None,
    tags: dict[str, str] | None = None,
    params: dict[str, str] | None = None,
) -> PastRun:
    known = {"git.commit": "c" * 40, "data.rev": "d.dir", "version.torch": "1"}
    return PastRun(
        "r" * 32, "tiny-1", "FINISHED", "", {**known, **(tags or {})}, params or {},
        metrics or {}, steps,
    )  # fmt: skip


def step(digest: str | None, key: str = "key") -> PastStep:
    return PastStep("s" * 32, key, digest)


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name / "results").mkdir(parents=True)
    return tmp_path / "a", tmp_path / "b"


def metrics_of(old: dict[str, float], new: dict[str, float], homes: tuple[Path, Path]) -> Agreement:
    return compare(past_run({}, old), past_run({}, new), homes, [])


def printed(found: Agreement) -> str:
    console = Console(width=300, no_color=True)
    with console.capture() as captured:
        show(console, found)
    return captured.get()


def test_equal_digests_agree(homes):
    run = past_run({"sft": step("a"), "rl": step("b")}, {"eval/kl": 0.5})

    found = compare(run, run, homes, [])

    assert found.agrees
    assert [found.steps[name].because for name in ("sft", "rl")] == ["", ""]
    assert not found.machine
    assert not found.params
    assert "every digest is as it was" in printed(found)


def test_one_other_digest_does_not_agree(homes):
    old = past_run({"sft": step("a"), "rl": step("b"), "evaluate": step("c")})
    new = past_run({"sft": step("a"), "rl": step("x"), "evaluate": step("c")})

    found = compare(old, new, homes, [])

    assert not found.agrees
    assert [name for name, s in found.steps.items() if not s.equal] == ["rl"]
    assert "the machine or a library" in found.steps["rl"].because
    assert "the digests differ from rl on" in printed(found)


@pytest.mark.parametrize(
    ("old", "new", "because"),
    [
        ({"rl": step("a")}, {}, "only the original has this step"),
        ({}, {"rl": step("a")}, "only the reproduction has this step"),
        ({"rl": step(None)}, {"rl": step("a")}, "its digest with it"),
        ({"rl": step(None)}, {"rl": step(None)}, "its digest with it"),
        ({"rl": step("a", "k1")}, {"rl": step("b", "k2")}, "other params, inputs or code"),
    ],
)
def test_a_step_without_its_like_does_not_agree(homes, old, new, because):
    found = compare(past_run(old), past_run(new), homes, [])

    assert not found.agrees
    assert because in found.steps["rl"].because


def test_runs_without_steps_do_not_agree(homes):
    assert not compare(past_run({}), past_run({}), homes, []).agrees


def test_a_step_from_other_ingredients_says_which(homes):
    for home, kl_coef in zip(homes, (0.05, 0.2), strict=True):
        key = f"rl-{kl_coef}"
        write_ingredients(home, key, Ingredients({"rl.kl_coef": kl_coef}, {}, {}))
        (home / "results" / key).write_text("{}")
    old, new = past_run({"rl": step("a", "rl-0.05")}), past_run({"rl": step("b", "rl-0.2")})

    assert compare(old, new, homes, []).steps["rl"].because == "rl.kl_coef: 0.05 → 0.2"


@pytest.mark.parametrize(
    ("old", "new", "agreement"),
    [
        (0.1, 0.1, "equal"),
        (math.nan, math.nan, "equal"),
        (math.inf, math.inf, "equal"),
        (1.0, 1.0 + 2**-52, "close"),
        (1.0, 1.0009, "close"),
        (1.0, 1.002, "different"),
        (0.0, 1e-12, "different"),
        (1.0, math.nan, "different"),
        (math.inf, 1.0, "different"),
    ],
)
def test_metrics_are_equal_to_the_bit_close_or_different(homes, old, new, agreement):
    found = metrics_of({"eval/kl": old}, {"eval/kl": new}, homes)

    assert found.metrics["eval/kl"].agreement == agreement


def test_a_metric_that_one_run_lacks_is_different(homes):
    found = metrics_of({"eval/kl": 1.0}, {"eval/win_rate": 1.0}, homes)

    assert {name: m.agreement for name, m in found.metrics.items()} == {
        "eval/kl": "different",
        "eval/win_rate": "different",
    }


def test_times_are_left_out_and_named(homes):
    old = {"rl/perf/tokens_per_s": 1.0, "perf/episodes_per_s": 2.0, "time/score_s": 3.0, "a": 1.0}

    found = metrics_of(old, {name: value * 2 for name, value in old.items()}, homes)

    assert set(found.metrics) == {"a"}
    assert set(found.left_out) == set(old) - {"a"}
    assert "left out as times: perf/episodes_per_s" in printed(found)


def test_another_machine_and_other_params_come_before_the_steps(homes):
    old = past_run({"rl": step("a")}, {}, {"hardware.cpus": "2"}, {"seed": "0"})
    tags = {"hardware.cpus": "2", "version.torch": "2"}
    new = past_run({"rl": step("b")}, {}, tags, {"seed": "0", "rl.new": "1"})

    found = compare(old, new, homes, ["the commit was taken as it is"])

    assert {name: (c.original, c.reproduced) for name, c in found.machine.items()} == {
        "version.torch": ("1", "2")
    }
    assert {name: (c.original, c.reproduced) for name, c in found.params.items()} == {
        "rl.new": (None, "1")
    }
    text = printed(found)
    places = [text.index(part) for part in ("taken as it is", "version.torch", "rl.new", "step ")]
    assert places == sorted(places)


def test_what_is_found_is_json(homes):
    run = past_run({"rl": step("a")}, {"eval/kl": 0.5})

    value = compare(run, run, homes, []).model_dump(mode="json")

    assert value["metrics"] == {
        "eval/kl": {"original": 0.5, "reproduced": 0.5, "agreement": "equal"}
    }
    assert value["steps"]["rl"] == {
        "digest": "a", "reproduced": "a", "equal": True, "because": "",
    }  # fmt: skip
