"""Tests of tasks.disk."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plumbline.data.tokenize import train_tokenizer
from plumbline.errors import MachineError
from plumbline.models.load import base_model
from plumbline.params.schema import (
    EvaluateParams,
    Experiment,
    GGUFModel,
    LocalModel,
    ScratchModel,
)
from tasks.disk import MODELS_WRITTEN, SPARE, check_room, checkpointed_models, model_bytes

LARGE = Experiment(model=ScratchModel(hidden_size=4096, layers=32, heads=32, vocab_size=32000))


def leave(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(monkeypatch, tmp_path):
    leave(monkeypatch, 3 * 2**30)

    with pytest.raises(MachineError) as error:
        check_room(tmp_path, LARGE, tmp_path)

    # Policy and critic, each with two moments, in three checkpoints.
    models = MODELS_WRITTEN + 2 * 3 * 3
    needed = (models * model_bytes(LARGE, tmp_path) + SPARE) / 2**30
    assert f"expected {needed:.2f} GiB free" in str(error.value)
    assert "got 3.00 GiB" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "PLUMBLINE_HOME" in str(error.value)


def test_just_enough_room_is_enough(monkeypatch, tmp_path):
    needed = (MODELS_WRITTEN + 18) * model_bytes(LARGE, tmp_path) + SPARE

    leave(monkeypatch, needed)
    check_room(tmp_path, LARGE, tmp_path)
    leave(monkeypatch, needed - 1)
    with pytest.raises(MachineError):
        check_room(tmp_path, LARGE, tmp_path)


def test_the_estimate_holds_the_weights_of_a_scratch_model(tmp_path):
    params = ScratchModel(vocab_size=300, context_tokens=32, hidden_size=64, layers=3, heads=4)
    tokenizer = train_tokenizer(["some text"], params.vocab_size)
    model = base_model(params, tmp_path, tokenizer, seed=0)

    estimate = model_bytes(Experiment.model_construct(model=params), tmp_path)
    weights = sum(p.numel() * torch.float32.itemsize for p in model.parameters())

    assert weights == pytest.approx(estimate, rel=0.2)


def test_of_a_local_model_the_files_count(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "m" / "notes.bin").write_bytes(bytes(5000))
    experiment = Experiment(model=LocalModel(source="local", path="m"))

    assert model_bytes(experiment, tmp_path) == 2000


def test_a_gguf_file_is_counted_in_float32_whatever_it_holds(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((30, 20), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(20, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GGUFModel(source="gguf", file="tiny.gguf", path=tmp_path.name)

    assert model_bytes(Experiment(model=model), tmp_path.parent) == 4 * (30 * 20 + 20)


def test_the_judge_is_one_more_model(monkeypatch, tmp_path):
    needed = (MODELS_WRITTEN + 18) * model_bytes(LARGE, tmp_path) + SPARE
    judged = LARGE.model_copy(update={"evaluate": EvaluateParams(judge=True)})

    leave(monkeypatch, needed)
    with pytest.raises(MachineError):
        check_room(tmp_path, judged, tmp_path)
    leave(monkeypatch, needed + model_bytes(LARGE, tmp_path))
    check_room(tmp_path, judged, tmp_path)


@pytest.mark.parametrize(
    ("params", "networks"),
    [
        ({}, 2),
        ({"rl": {"critic": "shared"}}, 1),
        ({"rl": {"algorithm": "grpo"}}, 1),
        ({"rl": {"lora": {"enabled": True}}}, 1),
        ({"alignment": {"method": "dpo"}}, 1),
    ],
)
def test_checkpoints_hold_the_trained_networks_of_the_largest_step(params, networks):
    experiment = Experiment.model_validate({**params, "checkpoints": {"keep": 1}})

    assert checkpointed_models(experiment) == 3 * networks * 2


def test_checkpoints_of_adapters_alone_are_not_counted():
    lora = {"lora": {"enabled": True}}
    experiment = Experiment.model_validate({"sft": lora, "reward_model": lora, "rl": lora})

    assert checkpointed_models(experiment) == 0
