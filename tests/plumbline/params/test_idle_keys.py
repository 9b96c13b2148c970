"""Keys that act only beside certain choices: refused where idle, dropped under another choice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from plumbline.errors import ParamsError
from plumbline.params.fields import catalogue
from plumbline.params.loader import Loaded, flatten, load_experiment
from plumbline.params.schema import DPOParams, Experiment, RLParams
from plumbline.params.tree import Node, plain, without, without_replaced

# Written by hand, from what the algorithms need.
# key: (the choices it acts with, its default, another value)
LORA = [f"{section}.lora" for section in ("sft", "reward_model", "rl", "dpo")]
ACTS_WITH: dict[str, tuple[dict[str, list[Any]], Any, Any]] = {
    "rl.critic": ({"rl.algorithm": ["ppo"]}, "reward_model", "shared"),
    "rl.gae_lambda": ({"rl.algorithm": ["ppo"]}, 0.95, 0.9),
    "rl.cliprange_value": ({"rl.algorithm": ["ppo"]}, 0.2, 0.3),
    "rl.value_coef": ({"rl.algorithm": ["ppo"]}, 0.1, 0.5),
    "rl.gamma": ({"rl.algorithm": ["ppo", "reinforce"]}, 1.0, 0.9),
    "rl.whiten_rewards": ({"rl.algorithm": ["ppo", "reinforce"]}, False, True),
    "rl.whiten_advantages": ({"rl.algorithm": ["ppo", "reinforce", "rloo"]}, True, False),
    "rl.responses_per_prompt": ({"rl.algorithm": ["rloo", "grpo"]}, 4, 8),
    "rl.baseline": ({"rl.algorithm": ["reinforce"]}, "mean", "none"),
    "rl.baseline_decay": (
        {"rl.algorithm": ["reinforce"], "rl.baseline": ["moving_average"]},
        0.9,
        0.5,
    ),
    "rl.kl_target": ({"rl.kl_controller": ["adaptive"]}, 6.0, 3.0),
    "rl.kl_horizon": ({"rl.kl_controller": ["adaptive"]}, 10_000, 5),
    "reward_model.centering": ({"reward_model.objective": ["pairwise"]}, 0.0, 0.1),
    **{f"{lora}.rank": ({f"{lora}.enabled": [True]}, 16, 8) for lora in LORA},
    **{f"{lora}.alpha": ({f"{lora}.enabled": [True]}, 32.0, 8.0) for lora in LORA},
    "rl": ({"alignment.method": ["rl"]}, {"kl_coef": 0.05}, {"kl_coef": 0.1}),
    "dpo": ({"alignment.method": ["dpo"]}, {"beta": 0.1}, {"beta": 0.2}),
}
OPTIONS: dict[str, list[Any]] = {
    "rl.algorithm": ["ppo", "reinforce", "rloo", "grpo"],
    "rl.baseline": ["none", "mean", "moving_average"],
    "rl.kl_controller": ["fixed", "adaptive"],
    "reward_model.objective": ["pairwise", "pointwise"],
    "alignment.method": ["rl", "dpo"],
    **{f"{lora}.enabled": [True, False] for lora in LORA},
}


def needed(key: str) -> dict[str, Any]:
    """Return choices with which a key acts, those of the section it stands in included."""
    dpo = {"alignment.method": "dpo"} if key.startswith("dpo.") else {}
    return dpo | {other: values[0] for other, values in ACTS_WITH[key][0].items()}


def against(key: str) -> Iterator[dict[str, Any]]:
    """Yield every set of choices in which one alone keeps the key from acting."""
    for other, values in ACTS_WITH[key][0].items():
        for option in OPTIONS[other]:
            # baseline itself acts only with reinforce.
            if option not in values:
                changed = needed(key) | {other: option}
                if other == "rl.algorithm":
                    changed.pop("rl.baseline", None)
                yield changed


CASES = [pytest.param(key, choice) for key in ACTS_WITH for choice in against(key)]
VALUES = [pytest.param(key, value) for key, row in ACTS_WITH.items() for value in row[1:]]


def text_of(values: Mapping[str, Any]) -> str:
    """Return the YAML that gives these values by dotted key, in their order."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = value
    return yaml.safe_dump(tree, sort_keys=False)


def line_of(text: str, key: str) -> int:
    """Return the number of the line that gives a dotted key."""
    path: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], line.strip().partition(":")[0]]
        if ".".join(path) == key:
            return number
    raise AssertionError(key)


def load(folder: Path, *overrides: str, **files: str) -> Loaded:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return load_experiment("a", folder, overrides)


def faults(folder: Path, *overrides: str, **files: str) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        load(folder, *overrides, **files)
    return str(caught.value).splitlines()


def expected_of(key: str, choice: Mapping[str, Any]) -> tuple[str, str]:
    """Return the choice that keeps a key from acting, and the reason as a message gives it."""
    wanted = ACTS_WITH[key][0]
    other = next(o for o, values in wanted.items() if choice.get(o) not in values)
    given = yaml_word(choice[other])
    options = [yaml_word(value) for value in wanted[other]]
    words = " or ".join([", ".join(options[:-1]), options[-1]] if options[1:] else options)
    return other, f"acts only with {other}={words}, and {other} is {given}"


def yaml_word(value: object) -> str:
    return {"True": "true", "False": "false"}.get(str(value), str(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    params = tmp_path / "params"
    params.mkdir()
    return params


# The table holds every such field of the schema, and the loader knows them all


def marked(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Yield every field of the schema that says that it acts with others only."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "acts_with" in extra:
            conditions: Any = extra["acts_with"]
            yield prefix + name, {prefix + other: values for other, values in conditions.items()}
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from marked(field.annotation, f"{prefix}{name}.")


def test_the_table_is_the_schema() -> None:
    table = {key: row[0] for key, row in ACTS_WITH.items()}
    assert dict(marked(Experiment)) == table == dict(catalogue().conditions)
    fields = {field.key: field for field in catalogue().fields}
    assert {key: set(fields[key].options) for key in OPTIONS} == {
        key: set(options) for key, options in OPTIONS.items()
    }
    assert {other for row in ACTS_WITH.values() for other in row[0]} == set(OPTIONS)


@pytest.mark.parametrize("key", [key for key in ACTS_WITH if key not in ("rl", "dpo")])
def test_the_table_has_the_default_of_each(key: str) -> None:
    default, other = ACTS_WITH[key][1:]
    value: Any = Experiment()
    for name in key.split("."):
        value = getattr(value, name)
    assert value == default != other
    assert RLParams().kl_coef == ACTS_WITH["rl"][1]["kl_coef"]
    assert DPOParams().beta == ACTS_WITH["dpo"][1]["beta"]


# Refused where they have no effect


@pytest.mark.parametrize("which", [1, 2], ids=["default", "other"])
@pytest.mark.parametrize(("key", "choice"), CASES)
def test_an_idle_key_is_refused_by_name_and_line_even_at_its_default(
    folder: Path, key: str, choice: dict[str, Any], which: int
) -> None:
    text = text_of({"seed": 1} | choice | {key: ACTS_WITH[key][which]})
    other, reason = expected_of(key, choice)
    assert faults(folder, a=text) == [
        f"params/a.yaml:{line_of(text, key)}: {key}: {reason} "
        f"(params/a.yaml:{line_of(text, other)}); remove it"
    ]


@pytest.mark.parametrize(("key", "choice"), CASES)
def test_an_idle_override_is_refused_by_what_was_typed(
    folder: Path, key: str, choice: dict[str, Any]
) -> None:
    value = ACTS_WITH[key][1]
    sets = {name: f"{name}={yaml_word(v)}" for name, v in choice.items()}
    leaf, value = (f"{key}.{next(iter(value))}", 0.1) if isinstance(value, dict) else (key, value)
    typed = f"{leaf}={yaml_word(value)}"
    other, reason = expected_of(key, choice)
    expected = f"--set {typed}: {key}: {reason} (--set {sets[other]}); remove it"
    assert faults(folder, *sets.values(), typed, a="seed: 1") == [expected]
    assert faults(folder, typed, *sets.values(), a="seed: 1") == [expected]
    text = text_of(choice)
    place = f"params/a.yaml:{line_of(text, other)}"
    assert faults(folder, typed, a=text) == [f"--set {typed}: {key}: {reason} ({place}); remove it"]


IDLE_BY_DEFAULT = [
    *("rl.responses_per_prompt", "rl.baseline", "rl.baseline_decay", "rl.kl_target"),
    *("rl.kl_horizon", "dpo", *(f"{x}.{y}" for x in LORA[:3] for y in ("rank", "alpha"))),
]


@pytest.mark.parametrize("key", ACTS_WITH)
def test_a_choice_that_nobody_made_counts_as_its_default(folder: Path, key: str) -> None:
    text = text_of({key: ACTS_WITH[key][1]})
    if key.startswith("dpo."):
        text = text_of({"alignment.method": "dpo", key: ACTS_WITH[key][1]})
    if key in IDLE_BY_DEFAULT or key.startswith("dpo."):
        (line,) = faults(folder, a=text)
        assert line.startswith(f"params/a.yaml:{line_of(text, key)}: {key}: acts only with ")
        assert line.endswith(" (the default); remove it")
    else:
        load(folder, a=text)


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_a_key_is_taken_with_every_choice_it_acts_with(
    folder: Path, key: str, value: object
) -> None:
    wanted = ACTS_WITH[key][0]
    for combination in itertools.product(*wanted.values()):
        choice = needed(key) | dict(zip(wanted, combination, strict=True))
        got = load(folder, a=text_of(choice | {key: value})).experiment
        for name in key.split("."):
            got = getattr(got, name)
        if isinstance(value, dict):
            assert isinstance(got, BaseModel)
            assert {name: getattr(got, name) for name in value} == value
        else:
            assert got == value


def test_all_idle_keys_are_reported_together_with_the_other_faults(folder: Path) -> None:
    text = (
        "rl:\n  algorithm: grpo\n  gae_lambda: 0.95\n  critic: shared\n  kl_coef: -1\n"
        "  lora:\n    rank: 4\nsft:\n  epochs: 0\n"
    )
    assert faults(folder, "rl.kl_target=6.0", a=text) == [
        "params/a.yaml:7: rl.lora.rank: acts only with rl.lora.enabled=true, and rl.lora.enabled "
        "is false (the default); remove it",
        "params/a.yaml:4: rl.critic: acts only with rl.algorithm=ppo, and rl.algorithm is grpo "
        "(params/a.yaml:2); remove it",
        "--set rl.kl_target=6.0: rl.kl_target: acts only with rl.kl_controller=adaptive, and "
        "rl.kl_controller is fixed (the default); remove it",
        "params/a.yaml:3: rl.gae_lambda: acts only with rl.algorithm=ppo, and rl.algorithm is grpo "
        "(params/a.yaml:2); remove it",
        "params/a.yaml:9: sft.epochs: expected an integer >= 1, got 0",
        "params/a.yaml:5: rl.kl_coef: expected a number >= 0, got -1",
    ]


@pytest.mark.parametrize("value", ["{}", "", "{nothing: 1}", "{lora: {rank: 4}, gamma: -1}"])
def test_an_idle_section_is_reported_once_whatever_it_holds(folder: Path, value: str) -> None:
    text = f"alignment:\n  method: dpo\nrl: {value}"
    assert faults(folder, a=text) == [
        "params/a.yaml:3: rl: acts only with alignment.method=rl, and alignment.method is dpo "
        "(params/a.yaml:2); remove it"
    ]


@pytest.mark.parametrize("choice", ["grppo", "1", "[ppo]", "{ppo: 1}", ""])
def test_a_choice_that_does_not_exist_is_the_only_fault(folder: Path, choice: str) -> None:
    (line,) = faults(folder, a=f"rl:\n  algorithm: {choice}\n  gae_lambda: 0.9")
    assert line.startswith("params/a.yaml:2: rl.algorithm: expected ppo, reinforce, rloo or grpo,")


# Dropped where a file that extends them, or an override, chooses otherwise


@pytest.mark.parametrize(("key", "choice"), CASES)
def test_another_choice_drops_what_belonged_to_the_old_one(
    folder: Path, key: str, choice: dict[str, Any]
) -> None:
    base = text_of(needed(key) | {key: ACTS_WITH[key][2]})
    assert load(folder, a=base)
    other = expected_of(key, choice)[0]
    plainly = load(folder, a=text_of({"seed": 0} | choice)).experiment
    kept = {other: choice[other]}
    by_file = load(folder, a=f"extends: b.yaml\n{text_of(kept)}", b=base)
    by_override = load(folder, f"{other}={yaml_word(choice[other])}", a=base)
    nothing_named = load(
        folder,
        f"{other}={yaml_word(choice[other])}",
        a=text_of({k: v for k, v in needed(key).items() if k != other} | {key: ACTS_WITH[key][2]}),
    )
    for loaded in (by_file, by_override, nothing_named):
        assert loaded.experiment == plainly
        assert not any(name == key or name.startswith(f"{key}.") for name in flatten(plainly))


@pytest.mark.parametrize(("key", "choice"), CASES)
def test_what_the_extending_file_names_itself_is_not_dropped(
    folder: Path, key: str, choice: dict[str, Any]
) -> None:
    base = text_of(needed(key) | {key: ACTS_WITH[key][2]})
    other, reason = expected_of(key, choice)
    text = text_of({"extends": "b.yaml", other: choice[other], key: ACTS_WITH[key][1]})
    place = f"params/a.yaml:{line_of(text, other)}"
    assert faults(folder, a=text, b=base) == [
        f"params/a.yaml:{line_of(text, key)}: {key}: {reason} ({place}); remove it"
    ]


def test_another_method_drops_the_whole_section_and_the_other_one_is_free(folder: Path) -> None:
    base = "rl:\n  algorithm: grpo\n  lora: {enabled: true, rank: 4}\n  kl_coef: 0.3\nseed: 7"
    over = "extends: b.yaml\nalignment: {method: dpo}\ndpo: {beta: 0.3}"
    experiment = load(folder, a=over, b=base).experiment
    assert (experiment.seed, experiment.dpo.beta, experiment.rl) == (7, 0.3, RLParams())
    back = load(folder, "alignment.method=rl", "rl.kl_coef=0.2", a=over, b=base).experiment
    assert (back.rl, back.dpo) == (RLParams(kl_coef=0.2), DPOParams())


def test_the_neighbours_of_what_is_dropped_stay(folder: Path) -> None:
    base = "rl: {gae_lambda: 0.9, kl_coef: 0.3, gamma: 0.8, lora: {enabled: true, rank: 4}}"
    rl = load(folder, "rl.algorithm=reinforce", "rl.baseline=none", a=base).experiment.rl
    assert (rl.gae_lambda, rl.kl_coef, rl.gamma, rl.lora.rank) == (0.95, 0.3, 0.8, 4)


def test_a_choice_made_and_taken_back_leaves_the_default(folder: Path) -> None:
    first, second = "rl: {gae_lambda: 0.5}", "extends: c.yaml\nrl: {algorithm: grpo}"
    third = "extends: b.yaml\nrl: {algorithm: ppo}"
    assert load(folder, a=third, b=second, c=first).experiment.rl.gae_lambda == 0.95


def test_a_base_may_hold_keys_of_an_algorithm_that_its_users_choose(folder: Path) -> None:
    base = "rl: {responses_per_prompt: 8, gae_lambda: 0.9}"
    users = {name: f"extends: _base.yaml\nrl: {{algorithm: {name}}}" for name in ("ppo", "grpo")}
    ppo = load(folder, a=users["ppo"], _base=base).experiment.rl
    grpo = load(folder, a=users["grpo"]).experiment.rl
    assert (ppo.responses_per_prompt, ppo.gae_lambda) == (4, 0.9)
    assert (grpo.responses_per_prompt, grpo.gae_lambda) == (8, 0.95)


@pytest.mark.parametrize("again", ["grpo", "rloo"])
def test_a_file_that_names_both_is_refused_under_any_other_choice(folder: Path, again: str) -> None:
    base = "rl:\n  algorithm: grpo\n  gae_lambda: 0.9"
    reason = f"acts only with rl.algorithm=ppo, and rl.algorithm is {again}"
    assert faults(folder, f"rl.algorithm={again}", a=base) == [
        f"params/a.yaml:3: rl.gae_lambda: {reason} (--set rl.algorithm={again}); remove it"
    ]
    over = f"extends: b.yaml\nrl: {{algorithm: {again}}}"
    assert faults(folder, a=over, b=base) == [
        f"params/b.yaml:3: rl.gae_lambda: {reason} (params/a.yaml:2); remove it"
    ]
    rl = load(folder, "rl.algorithm=ppo", a=base).experiment.rl
    assert rl.gae_lambda == 0.9


# The trees below


def test_only_what_the_new_choice_makes_idle_is_left_out() -> None:
    conditions = {"s.x": {"s.kind": ["a"]}, "s.y": {"s.kind": ["a", "b"]}, "t": {"s.kind": ["a"]}}
    inner = {"kind": Node("a", "f:2"), "x": Node(1, "f:3"), "y": Node(2, "f:4")}
    base = Node({"s": Node(inner, "f:1"), "t": Node({"z": Node(3, "f:6")}, "f:5")}, "f")

    def chosen(kind: object) -> Node:
        return Node({"s": Node({"kind": Node(kind, "g:2")}, "g:1")}, "g")

    assert plain(without_replaced(base, chosen("b"), conditions)) == {"s": {"kind": "a", "y": 2}}
    assert plain(without_replaced(base, chosen("c"), conditions)) == {"s": {"kind": "a"}}
    assert without_replaced(base, chosen("a"), conditions) == base
    assert without_replaced(base, Node({"s": Node(3, "g")}, "g"), conditions) == base
    assert without_replaced(chosen("a"), chosen("b"), conditions) == chosen("a")
    assert base.children["s"].children == inner


def test_leaving_out_what_is_not_there_changes_nothing() -> None:
    tree = Node({"a": Node({"b": Node(1, "f:2")}, "f:1"), "c": Node(2, "f:3")}, "f")
    assert without(tree, ["x", "a.x", "c.x", "a.b.x"]) == tree
    assert plain(without(tree, ["a.b"])) == {"a": {}, "c": 2}
    assert plain(without(tree, ["a", "a.b", "c"])) == {}
