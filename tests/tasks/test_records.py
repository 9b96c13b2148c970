"""Tests of tasks.records."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from plumbline.artifacts import MANIFEST, Fault, digest_of, write_manifest
from plumbline.refs import (
    DataRef,
    EvaluationRef,
    ModelRef,
    PreparedData,
    SplitRef,
    StepResult,
    file_digest,
    folder_digest,
)
from tasks.keys import Ingredients
from tasks.records import (
    ADAPTED,
    MODEL_PARTS,
    damage,
    faults,
    local_path,
    read_result,
    records,
    step_of,
    write_ingredients,
)

KEY = "sft-1"
CONTENT = ("model/model.safetensors", "components/tokenizer/tokenizer.json")


def as_prefect_writes(result: StepResult, serializer: str = "json") -> dict[str, Any]:
    """A record of Prefect 3.8, taken from one that a run has written."""
    data = {
        "__class__": f"plumbline.refs.{type(result).__name__}",
        "data": result.model_dump(mode="json"),
    }
    return {
        "metadata": {
            "storage_key": "results/sft-1",
            "expiration": None,
            "serializer": {
                "type": serializer,
                "jsonlib": "json",
                "object_encoder": "prefect.serializers.prefect_json_object_encoder",
                "object_decoder": "prefect.serializers.prefect_json_object_decoder",
                "dumps_kwargs": {},
                "loads_kwargs": {},
            },
            "prefect_version": "3.8.8",
            "storage_block_id": None,
        },
        "result": json.dumps(data),
    }


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    folder = tmp_path / "a model"
    for name in (*CONTENT, "MLmodel", ADAPTED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_manifest(folder)
    return ModelRef(
        digest=folder_digest(folder, MODEL_PARTS),
        uri=folder.as_uri(),
        mlflow_run_id="run",
        mlflow_model_id="m-1",
        metrics={"sft/held_out_loss": 1.5},
    )


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    folder = tmp_path / "prepared"
    folder.mkdir()

    def ref(name: str) -> DataRef:
        path = folder / f"{name}.parquet"
        path.write_text(name)
        return DataRef(digest=file_digest(path), uri=path.as_uri(), rows=1)

    tables = {
        table: SplitRef(train=ref(f"{table}-train"), test=ref(f"{table}-test"))
        for table in ("demonstrations", "preferences", "prompts")
    }
    (folder / "failures.json").write_text("[]")
    write_manifest(folder)
    return PreparedData(digest="d", uri=folder.as_uri(), mlflow_run_id="run", **tables)


def test_a_result_is_read_as_it_was_returned(tmp_path, model):
    (tmp_path / KEY).write_text(json.dumps(as_prefect_writes(model)))

    assert read_result(tmp_path, "sft", KEY) == model


def test_a_missing_record_is_no_result(tmp_path):
    assert read_result(tmp_path, "sft", KEY) is None
    assert read_result(tmp_path / "nowhere", "sft", KEY) is None


@pytest.mark.parametrize("serializer", ["pickle", "compressed/json", ""])
def test_a_record_of_another_serializer_is_no_result(tmp_path, model, serializer):
    (tmp_path / KEY).write_text(json.dumps(as_prefect_writes(model, serializer)))

    assert read_result(tmp_path, "sft", KEY) is None


@pytest.mark.parametrize(
    "change", [{"object_decoder": "os.system"}, {"jsonlib": "pickle"}], ids=str
)
def test_a_record_that_names_code_to_read_it_with_is_no_result(tmp_path, model, change):
    record = as_prefect_writes(model)
    record["metadata"]["serializer"] |= change
    (tmp_path / KEY).write_text(json.dumps(record))

    assert read_result(tmp_path, "sft", KEY) is None


def test_a_record_that_names_a_class_of_its_own_is_no_result(tmp_path, model):
    record = as_prefect_writes(model)
    record["result"] = record["result"].replace("plumbline.refs.ModelRef", "subprocess.Popen")
    (tmp_path / KEY).write_text(json.dumps(record))

    assert read_result(tmp_path, "sft", KEY) is None


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_record_that_breaks_off_is_no_result(tmp_path, model, length):
    (tmp_path / KEY).write_text(json.dumps(as_prefect_writes(model))[:length])

    assert read_result(tmp_path, "sft", KEY) is None


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"metadata": 3}', b'{"metadata": {}}']
)
def test_a_garbled_record_is_no_result(tmp_path, content):
    (tmp_path / KEY).write_bytes(content)

    assert read_result(tmp_path, "sft", KEY) is None


def test_a_record_of_another_step_is_no_result(tmp_path, model, prepared):
    (tmp_path / KEY).write_text(json.dumps(as_prefect_writes(prepared)))

    assert read_result(tmp_path, "sft", KEY) is None


@pytest.mark.parametrize(
    "hidden",
    [
        {"figures": {"__class__": "subprocess.Popen", "data": "true"}},
        {"figures": {"__exc_type__": "builtins.SystemExit", "message": "1"}},
        {"metrics": {"a": {"__class__": "subprocess.Popen", "data": {}}}},
    ],
    ids=str,
)
def test_a_record_that_names_code_further_in_is_no_result(tmp_path, model, hidden):
    record = as_prefect_writes(model)
    result = json.loads(record["result"])
    result["data"] |= hidden
    record["result"] = json.dumps(result)
    (tmp_path / KEY).write_text(json.dumps(record))

    assert read_result(tmp_path, "sft", KEY) is None


@pytest.mark.parametrize("serializer", [[], "json", None, {}], ids=repr)
def test_a_record_without_prefect_s_own_serializer_is_no_result(tmp_path, model, serializer):
    record = as_prefect_writes(model)
    record["metadata"]["serializer"] = serializer
    (tmp_path / KEY).write_text(json.dumps(record))

    assert read_result(tmp_path, "sft", KEY) is None


def test_a_record_that_nests_without_end_is_no_result(tmp_path):
    (tmp_path / KEY).write_text('{"metadata": ' + "[" * 100_000)

    assert read_result(tmp_path, "sft", KEY) is None


def test_a_record_of_before_there_were_digests_of_figures_is_read(tmp_path, model):
    record = as_prefect_writes(model)
    result = json.loads(record["result"])
    del result["data"]["figure_digests"]
    record["result"] = json.dumps(result)
    (tmp_path / KEY).write_text(json.dumps(record))

    assert read_result(tmp_path, "sft", KEY) == model


def test_a_key_names_its_step():
    assert step_of("reward_model-0a1b") == "reward_model"
    assert step_of("rl-0a1b") == "rl"
    assert step_of("4ba98bd7333f40db9cd55a5bdd9732cf") is None
    assert step_of("nosuch-0a1b") is None


def test_a_whole_model_is_not_damaged(model):
    assert damage(model) is None


def test_what_stands_beside_a_model_may_change(model):
    (local_path(model.uri) / "MLmodel").write_text("another time")
    (local_path(model.uri) / "registered_model_meta").write_text("MLflow's own")

    assert damage(model) is None


def test_a_deleted_model_is_damage(model):
    shutil.rmtree(local_path(model.uri))

    assert faults(model) == [Fault(local_path(model.uri), "is gone", "a folder", "none")]


@pytest.mark.parametrize("name", [*CONTENT, "MLmodel", ADAPTED])
def test_a_deleted_file_of_a_model_is_named(model, name):
    path = local_path(model.uri) / name
    path.unlink()

    assert damage(model) == f"{path} is gone: expected a file, got none"


@pytest.mark.parametrize("name", [*CONTENT, ADAPTED])
def test_a_truncated_file_of_a_model_is_named_with_its_sizes(model, name):
    path = local_path(model.uri) / name
    path.write_text(name[:4])

    assert damage(model) == f"{path} was cut short: expected {len(name)} bytes, got 4 bytes"


@pytest.mark.parametrize("name", [*CONTENT, ADAPTED])
def test_one_flipped_bit_in_a_file_of_a_model_is_named_with_its_digests(model, name):
    path = local_path(model.uri) / name
    before = file_digest(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    (fault,) = faults(model)
    assert fault == Fault(
        path,
        "does not match its digest",
        f"sha256 {before}",
        f"{file_digest(path)} in {len(name)} bytes",
    )


def test_a_file_added_to_a_model_is_named(model):
    path = local_path(model.uri) / "model" / "model-2.safetensors"
    path.write_text("")

    assert damage(model) == f"{path} was added: expected no such file, got one"


def test_two_files_in_exchange_are_both_named(model):
    first, second = (local_path(model.uri) / name for name in CONTENT)
    swapped = first.read_bytes(), second.read_bytes()
    second.write_bytes(swapped[0])
    first.write_bytes(swapped[1])

    assert {fault.path for fault in faults(model)} == {first, second}
    assert damage(model).endswith("(and 1 more)")


@pytest.mark.parametrize("content", [None, "", '{"model/model.safetensors": {}}'])
def test_without_its_manifest_a_model_is_held_against_its_digest(model, content):
    folder = local_path(model.uri)
    if content is None:
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(content)
    assert damage(model) is None

    (folder / CONTENT[0]).write_text("other")
    assert damage(model).startswith(f"{folder} does not match its digest: expected sha256")


def test_a_manifest_that_was_made_to_fit_the_damage_does_not_hide_it(model):
    folder = local_path(model.uri)
    (folder / CONTENT[0]).write_text("other")
    write_manifest(folder)

    assert "does not match its digest" in damage(model)


def test_files_are_hashed_by_the_hasher_that_is_given(model):
    seen = []

    def hasher(path):
        seen.append(path.name)
        return file_digest(path)

    assert damage(model, hasher) is None
    assert sorted(seen) == ["adapted_model.json", "model.safetensors", "tokenizer.json"]


def test_whole_data_is_not_damaged(prepared):
    assert damage(prepared) is None


@pytest.mark.parametrize("table", ["demonstrations", "preferences", "prompts"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_table_of_the_data_is_looked_at(prepared, table, split):
    path = local_path(getattr(getattr(prepared, table), split).uri)
    size = path.stat().st_size

    path.write_text("x" * size)
    assert damage(prepared).startswith(f"{path} does not match its digest")
    path.write_text("x")
    assert damage(prepared) == f"{path} was cut short: expected {size} bytes, got 1 bytes"
    path.unlink()
    assert damage(prepared).startswith(f"{path} is gone")


def test_a_manifest_that_was_made_to_fit_does_not_hide_damaged_data(prepared):
    path = local_path(prepared.prompts.train.uri)
    path.write_text("other")
    write_manifest(path.parent)

    assert damage(prepared).startswith(f"{path} does not match its digest")


def test_what_the_data_has_for_people_is_looked_at(prepared):
    path = local_path(prepared.uri) / "failures.json"
    path.unlink()

    assert damage(prepared).startswith(f"{path} is gone")


@pytest.mark.parametrize("content", [None, "{", "{}}"], ids=["deleted", "truncated", "grown"])
def test_a_damaged_evaluation_is_named_once(tmp_path, content):
    path = tmp_path / "samples.json"
    path.write_text("{}")
    result = EvaluationRef(
        digest=file_digest(path),
        uri=path.as_uri(),
        mlflow_run_id="run",
        figures={"samples.json": path.as_uri()},
        figure_digests={"samples.json": digest_of(path)},
    )
    assert damage(result) is None

    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    (fault,) = faults(result)
    assert fault.path == path


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    path = tmp_path / "curves.png"
    path.write_bytes(b"picture")
    return path


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is gone"),
        (b"pic", "was cut short: expected 7 bytes, got 3 bytes"),
        (b"pictura", "does not match its digest"),
    ],
    ids=["deleted", "truncated", "altered"],
)
def test_a_damaged_figure_is_named(model, figure, content, what):
    named = {"curves.png": figure.as_uri()}
    digests = {"curves.png": digest_of(figure)}
    result = model.model_copy(update={"figures": named, "figure_digests": digests})
    assert damage(result) is None

    if content is None:
        figure.unlink()
    else:
        figure.write_bytes(content)

    assert damage(result).startswith(f"{figure} {what}")


def test_a_figure_of_before_there_were_digests_must_be_there(model, figure):
    result = model.model_copy(update={"figures": {"curves.png": figure.as_uri()}})

    assert damage(result) is None
    figure.unlink()
    assert damage(result).startswith(f"{figure} is gone")


def test_a_model_on_another_machine_is_taken_at_its_word(model):
    assert damage(model.model_copy(update={"uri": "s3://bucket/model"})) is None


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a%20b/c", Path("/a b/c")),
        ("/a/b", Path("/a/b")),
        ("s3://bucket/key", None),
        ("mlflow-artifacts:/1/2", None),
        ("models:/name/1", None),
    ],
)
def test_a_uri_names_a_path_only_where_it_is_local(uri, path):
    assert local_path(uri) == path


def test_finished_runs_come_newest_first_and_by_step(tmp_path):
    (tmp_path / "results").mkdir()
    for made, key in enumerate(("sft-1", "sft-2", "rl-1")):
        write_ingredients(tmp_path, key, Ingredients({"key": key}, {"x": "1"}, {}))
        (tmp_path / "results" / key).write_text("{}")
        os.utime(tmp_path / "results" / key, (made, made))

    found = records(tmp_path, "sft")

    assert [record.key for record in found] == ["sft-2", "sft-1"]
    assert found[0].ingredients == Ingredients({"key": "sft-2"}, {"x": "1"}, {})


def test_ingredients_without_a_result_or_garbled_are_no_record(tmp_path):
    (tmp_path / "results").mkdir()
    for key in ("sft-1", "sft-2"):
        write_ingredients(tmp_path, key, Ingredients({}, {}, {}))
    (tmp_path / "results" / "sft-2").write_text("{}")
    (tmp_path / "ingredients" / "sft-2.json").write_text("{")

    assert records(tmp_path, "sft") == []
    assert records(tmp_path / "nowhere", "sft") == []


def test_ingredients_leave_no_file_aside(tmp_path):
    write_ingredients(tmp_path, KEY, Ingredients({}, {}, {}))

    assert [path.name for path in (tmp_path / "ingredients").iterdir()] == [f"{KEY}.json"]
