"""Tests of tasks.keys."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.errors import ParamsError
from plumbline.params.schema import GGUFModel, LocalModel, RegistryParams, RLParams, SFTParams
from plumbline.project import Project
from plumbline.refs import DataRef, DataVersion, ModelRef, SplitRef
from tasks import keys
from tasks.keys import Ingredients, Pending, cache_key, ingredients, model_files

names = st.text("abcdef._/", min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
digests = st.text("0123456789abcdef", min_size=4, max_size=8)
parts_of_steps = st.builds(
    Ingredients,
    st.dictionaries(names, scalars | st.floats(allow_nan=False, allow_infinity=False)),
    st.dictionaries(names, digests),
    st.dictionaries(names, digests),
)


def model_ref(**changes: Any) -> ModelRef:
    fields = {"digest": "aa", "uri": "file:///m", "mlflow_run_id": "r", "mlflow_model_id": "m"}
    return ModelRef(**{**fields, **changes})


def data_ref(digest: str) -> DataRef:
    return DataRef(digest=digest, uri=f"file:///{digest}.parquet", rows=3)


@given(parts_of_steps, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_count(parts, rng):
    def shuffled(mapping):
        items = list(mapping.items())
        rng.shuffle(items)
        return dict(items)

    assert cache_key("rl", Ingredients(*map(shuffled, parts))) == cache_key("rl", parts)


@given(parts_of_steps, st.sampled_from([0, 1, 2]), names, digests)
def test_every_value_counts(parts, which, name, value):
    changed = dict(parts[which])
    changed[name] = "another" if changed.get(name) == value else value
    other = Ingredients(*[changed if i == which else part for i, part in enumerate(parts)])

    assert cache_key("rl", other) != cache_key("rl", parts)


@given(names, st.lists(scalars, min_size=2, max_size=2))
def test_values_of_different_types_differ(name, values):
    keys = {cache_key("rl", Ingredients({name: value}, {}, {})) for value in values}

    assert len(keys) == len({json.dumps(value) for value in values})


def test_a_param_an_input_and_a_module_of_the_same_name_differ():
    keys = {
        cache_key("rl", parts)
        for parts in (
            Ingredients({"x": "1"}, {}, {}),
            Ingredients({}, {"x": "1"}, {}),
            Ingredients({}, {}, {"x": "1"}),
        )
    }

    assert len(keys) == 3


def test_steps_with_the_same_ingredients_have_their_own_keys():
    parts = Ingredients({}, {}, {})

    assert cache_key("rl", parts).startswith("rl-")
    assert cache_key("rl", parts).removeprefix("rl-") == cache_key("sft", parts).removeprefix(
        "sft-"
    )


def test_the_key_is_the_sha256_of_the_sorted_json():
    parts = Ingredients({"b": 1, "a": 0.5}, {"m": "aa"}, {"tasks.rl": "bb"})
    text = '{"code":{"tasks.rl":"bb"},"inputs":{"m":"aa"},"params":{"a":0.5,"b":1}}'

    assert cache_key("rl", parts) == "rl-" + hashlib.sha256(text.encode()).hexdigest()[:40]


def test_a_number_that_is_not_finite_has_no_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache_key("rl", Ingredients({"x": float("nan")}, {}, {}))


def test_params_become_dotted_values():
    parts = ingredients("sft", {"params": SFTParams(epochs=7), "seed": 3})

    assert parts.params["sft.epochs"] == 7
    assert parts.params["seed"] == 3
    names = {name for name in SFTParams.model_fields if name != "lora"} | {"lora.enabled"}
    assert set(parts.params) == {"seed", *(f"sft.{name}" for name in names)}
    assert parts.inputs == {}


@pytest.mark.parametrize(
    "change", [{"kl_coef": 0.06}, {"episodes": 8192}, {"whiten_rewards": True}], ids=str
)
def test_every_param_changes_the_key(change):
    old, new = (
        cache_key("rl", ingredients("rl", {"params": RLParams(**values)}))
        for values in ({}, change)
    )

    assert old != new


def test_a_default_that_is_written_out_does_not_count():
    said = RLParams(kl_coef=RLParams.model_fields["kl_coef"].default)

    assert ingredients("rl", {"params": said}) == ingredients("rl", {"params": RLParams()})


def test_of_a_ref_only_its_digest_counts():
    here = ingredients("rl", {"sft": model_ref()})
    moved = ingredients(
        "rl",
        {
            "sft": model_ref(
                uri="file:///n", mlflow_run_id="s", mlflow_model_id="n", metrics={"a": 1.0}
            )
        },
    )
    changed = ingredients("rl", {"sft": model_ref(digest="bb")})

    assert here == moved
    assert here.inputs == {"sft": "aa"}
    assert changed.inputs == {"sft": "bb"}


def test_data_counts_file_by_file_and_not_by_the_version_that_has_it():
    data = DataVersion(digest="d", path="data/a", rev="r", files={"prompts.jsonl": "p"})
    other = data.model_copy(update={"digest": "e", "rev": "s", "dirty": True})

    parts = ingredients("prepare_data", {"data": data})

    assert parts.inputs == {"data/a/prompts.jsonl": "p"}
    assert ingredients("prepare_data", {"data": other}) == parts


def test_both_splits_of_a_table_count():
    parts = ingredients("sft", {"rows": SplitRef(train=data_ref("t"), test=data_ref("u"))})

    assert parts.inputs == {"rows/train": "t", "rows/test": "u"}


def test_an_input_that_is_not_made_yet_is_unknown():
    parts = ingredients("sft", {"base_model": Pending("base_model"), "seed": 0})

    assert parts.inputs == {"base_model": None}
    assert not parts.complete
    assert ingredients("sft", {"base_model": model_ref()}).complete


def test_what_is_part_of_a_pending_result_is_pending():
    pending = Pending("prepare_data")

    assert pending.demonstrations.train == pending
    assert pending.demonstrations.train.step == "prepare_data"


def test_a_param_that_the_step_does_not_read_is_left_out():
    parts = ingredients("register", {"params": RegistryParams(alias="other")})

    assert parts.params == {"registry.name": "plumbline-policy", "registry.merge_lora": True}


# Models on this machine.


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with a model's folder and a GGUF file, all long untouched."""
    project = Project(tmp_path, tmp_path / "home")
    project.home.mkdir()
    files = ("config.json", "model.safetensors", "more/chat_template.jinja", ".cache/x", ".hidden")
    for name in (*(f"llm/{file}" for file in files), "gguf/a.gguf"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(keys, "find_project", lambda: project)
    return project


LOCAL = LocalModel(source="local", path="llm")
GGUF = GGUFModel(source="gguf", path="gguf", file="a.gguf")


def key_of(step: Any, model: Any) -> str:
    arguments = {"params" if step == "base_model" else "model": model}
    return cache_key(step, ingredients(step, arguments))


def test_the_files_of_a_local_model_are_inputs(project):
    parts = ingredients("base_model", {"params": LOCAL})

    names = ["llm/config.json", "llm/model.safetensors", "llm/more/chat_template.jinja"]
    assert parts.inputs == {n: hashlib.sha256(n.encode()).hexdigest() for n in names}
    assert parts.params["model.path"] == "llm"


def test_the_file_of_a_gguf_model_is_an_input_for_its_tokenizer_too(project):
    digest = hashlib.sha256(b"gguf/a.gguf").hexdigest()

    for step, name in (("base_model", "params"), ("prepare_data", "model")):
        assert ingredients(step, {name: GGUF}).inputs == {"gguf/a.gguf": digest}


@pytest.mark.parametrize(
    ("file", "model", "touched"),
    [
        ("llm/config.json", LOCAL, {"base_model", "prepare_data"}),
        ("llm/model.safetensors", LOCAL, {"base_model"}),
        ("llm/more/chat_template.jinja", LOCAL, {"base_model", "prepare_data"}),
        ("llm/.hidden", LOCAL, set()),
        ("llm/.cache/x", LOCAL, set()),
        ("gguf/a.gguf", GGUF, {"base_model", "prepare_data"}),
        ("gguf/a.gguf", LOCAL, set()),
    ],
)
def test_an_edit_of_a_models_file_counts_for_the_steps_that_read_it(project, file, model, touched):
    steps = ("base_model", "prepare_data")
    before = {step: key_of(step, model) for step in steps}
    path = project.root / file

    # Neither a touch nor another inode is an edit.
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert {step: key_of(step, model) for step in steps} == before

    # One byte, with size and time as they were.
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, (1e9, 1e9))
    assert {step for step in steps if key_of(step, model) != before[step]} == touched

    path.write_bytes(content)
    assert {step: key_of(step, model) for step in steps} == before


def test_a_file_that_comes_or_goes_is_an_edit(project):
    before = key_of("base_model", LOCAL)
    (project.root / "llm" / "generation_config.json").write_text("{}")
    more = key_of("base_model", LOCAL)
    (project.root / "llm" / "generation_config.json").unlink()
    (project.root / "llm" / "config.json").unlink()
    less = key_of("base_model", LOCAL)

    assert len({before, more, less}) == 3


def test_a_model_that_is_not_there_is_named(project):
    with pytest.raises(ParamsError, match=r"model\.path: expected a folder .* got .*nowhere"):
        model_files(LocalModel(source="local", path="nowhere"), project, weights=True)


def test_keys_need_no_framework():
    code = (
        "import sys, tasks.keys, tasks.records, tasks.sources;"
        "print({'torch', 'prefect', 'mlflow', 'dvc', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout == "set()\n", done.stderr
