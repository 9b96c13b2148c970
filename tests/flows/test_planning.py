"""Tests of flows.planning."""

import pytest

from flows.planning import explain, make_plan
from flows.wiring import wiring
from plumbline.params.schema import Experiment, LocalModel, steps_of
from plumbline.project import Project
from plumbline.refs import DataVersion
from tasks.keys import Ingredients
from tasks.records import Record

STEPS = steps_of(Experiment())

OLD = Ingredients(
    {"rl.kl_coef": 0.05, "rl.epochs": 4, "seed": 0},
    {"sft": "a" * 64, "reward_model": "b" * 64},
    {"tasks.rl": "1", "plumbline.losses.policy": "2"},
)


def record(parts: Ingredients, made: float = 0.0) -> Record:
    return Record("rl-1", parts, made)


def changed(**parts: dict[str, object]) -> Ingredients:
    return OLD._replace(**{name: {**getattr(OLD, name), **part} for name, part in parts.items()})


def test_a_step_without_a_past_never_ran():
    assert explain(OLD, []) == "never ran before"


def test_a_changed_param_is_named_with_both_values():
    new = changed(params={"rl.kl_coef": 0.2})

    assert explain(new, [record(OLD)]) == "rl.kl_coef: 0.05 → 0.2"


def test_a_changed_input_is_named_with_both_digests():
    new = changed(inputs={"sft": "c" * 64})

    assert explain(new, [record(OLD)]) == "input sft: aaaaaaaa → cccccccc"


def test_a_pending_input_is_no_change():
    new = changed(inputs={"sft": None}, params={"seed": 1})

    assert explain(new, [record(OLD)]) == "seed: 0 → 1"


def test_changed_code_is_named_by_module():
    new = changed(code={"plumbline.losses.policy": "3"})

    assert explain(new, [record(OLD)]) == "code: plumbline.losses.policy"


def test_a_param_that_came_or_went_is_a_change():
    without = OLD._replace(params={k: v for k, v in OLD.params.items() if k != "rl.epochs"})

    assert explain(without, [record(OLD)]) == "rl.epochs: 4 → None"
    assert explain(OLD, [record(without)]) == "rl.epochs: None → 4"


def test_of_many_changes_three_are_shown_and_the_rest_counted():
    new = changed(params={"rl.kl_coef": 0.2, "rl.epochs": 5, "seed": 1}, inputs={"sft": "c" * 64})

    assert explain(new, [record(OLD)]) == (
        "rl.epochs: 4 → 5; rl.kl_coef: 0.05 → 0.2; seed: 0 → 1; and 1 more"
    )


def test_the_most_similar_past_is_compared():
    far = changed(params={"rl.kl_coef": 0.9, "seed": 9})
    new = changed(params={"rl.kl_coef": 0.2})

    assert explain(new, [record(far, 2.0), record(OLD, 1.0)]) == "rl.kl_coef: 0.05 → 0.2"


def test_without_a_change_the_result_must_be_gone():
    assert explain(OLD, [record(OLD)]) == "its result is gone"


@pytest.fixture
def fresh(tmp_path) -> Project:
    return Project(tmp_path, tmp_path / ".plumbline")


DATA = DataVersion(digest="d", path="data/a", rev="r", files={"prompts.jsonl": "p"})


def test_a_fresh_project_runs_everything_and_a_plan_makes_nothing(fresh):
    plan = make_plan(fresh, Experiment(), DATA)

    assert tuple(plan) == tuple(wiring(Experiment())) == STEPS
    assert {step.action for step in plan.values()} == {"run"}
    assert {step.because for step in plan.values()} == {"never ran before"}
    assert not fresh.home.exists()


def test_a_step_that_is_asked_for_runs(fresh):
    plan = make_plan(fresh, Experiment(), DATA, refresh=("sft",))

    assert plan["sft"] == ("run", "asked for with --refresh")


def test_a_model_that_is_not_from_scratch_does_not_wait_for_the_data():
    local = Experiment(model=LocalModel(source="local", path="m"))

    arguments = wiring(local)["base_model"]({"prepare_data": None})

    assert arguments["demonstrations"] is None
