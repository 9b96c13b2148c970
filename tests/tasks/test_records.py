"""Tests of tasks.records."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

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
    MODEL_PARTS,
    damage,
    local_path,
    read_result,
    records,
    write_ingredients,
)

KEY = "sft-1"


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
    for name in ("model/model.safetensors", "components/tokenizer/tokenizer.json", "MLmodel"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return ModelRef(
        digest=folder_digest(folder, MODEL_PARTS),
        uri=folder.as_uri(),
        mlflow_run_id="run",
        mlflow_model_id="m-1",
        metrics={"sft/held_out_loss": 1.5},
    )


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    def ref(name: str) -> DataRef:
        path = tmp_path / f"{name}.parquet"
        path.write_text(name)
        return DataRef(digest=file_digest(path), uri=path.as_uri(), rows=1)

    tables = {
        table: SplitRef(train=ref(f"{table}-train"), test=ref(f"{table}-test"))
        for table in ("demonstrations", "preferences", "prompts")
    }
    return PreparedData(digest="d", uri=tmp_path.as_uri(), mlflow_run_id="run", **tables)


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


def test_a_whole_model_is_not_damaged(model):
    assert damage(model) is None


def test_what_stands_beside_a_model_may_change(model):
    (local_path(model.uri) / "MLmodel").write_text("another time")

    assert damage(model) is None


def test_a_deleted_model_is_damage(model):
    shutil.rmtree(local_path(model.uri))

    assert damage(model).endswith("is gone")


@pytest.mark.parametrize("name", ["model/model.safetensors", "components/tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", [None, "other"], ids=["deleted", "altered"])
def test_a_changed_part_of_a_model_is_damage(model, name, content):
    path = local_path(model.uri) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    assert damage(model).endswith("does not match its digest")


def test_a_file_added_to_a_model_is_damage(model):
    (local_path(model.uri) / "model" / "model-2.safetensors").write_text("")

    assert damage(model).endswith("does not match its digest")


def test_whole_data_is_not_damaged(prepared):
    assert damage(prepared) is None


@pytest.mark.parametrize("table", ["demonstrations", "preferences", "prompts"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_table_of_the_data_is_looked_at(prepared, table, split):
    path = local_path(getattr(getattr(prepared, table), split).uri)

    path.write_text("other")
    assert damage(prepared) == f"{path} does not match its digest"
    path.unlink()
    assert damage(prepared) == f"{path} is gone"


def test_a_deleted_evaluation_is_damage(tmp_path):
    path = tmp_path / "samples.json"
    path.write_text("{}")
    result = EvaluationRef(digest=file_digest(path), uri=path.as_uri(), mlflow_run_id="run")

    assert damage(result) is None
    path.unlink()
    assert damage(result) == f"{path} is gone"


def test_a_deleted_figure_is_damage(tmp_path, model):
    figure = tmp_path / "curves.png"
    figure.write_bytes(b"")
    result = model.model_copy(update={"figures": {"curves.png": figure.as_uri()}})

    assert damage(result) is None
    figure.unlink()
    assert damage(result) == f"{figure} is gone"


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
