"""A pretrained model must be there, and long enough, before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from plumbline.errors import ParamsError
from plumbline.models.context import CONTEXT_KEYS, check_model
from plumbline.params.schema import DataParams, Experiment, LocalModel, SamplingParams


def experiment(path: str) -> Experiment:
    return Experiment(
        model=LocalModel(source="local", path=path),
        data=DataParams(max_prompt_tokens=70, max_response_tokens=40),
        sampling=SamplingParams(response_tokens=60),
    )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))


def test_a_context_too_small_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_config(tmp_path, {"n_positions": 129})
    with pytest.raises(ParamsError, match=r"<= 129, got 70 \+ 60 = 130"):
        check_model(experiment("model"), tmp_path)


@pytest.mark.parametrize("key", CONTEXT_KEYS)
def test_a_context_just_large_enough_passes(tmp_path: Path, key: str) -> None:
    write_config(tmp_path, {key: 130})
    check_model(experiment("model"), tmp_path)


def test_an_absolute_path_does_not_need_the_root(tmp_path: Path) -> None:
    write_config(tmp_path, {"max_position_embeddings": 130})
    check_model(experiment(str(tmp_path / "model")), tmp_path / "elsewhere")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"model\.path: expected a folder with config\.json"):
        check_model(experiment("model"), tmp_path)


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ParamsError, match=r"can't read .*config\.json"):
        check_model(experiment("model"), tmp_path)


def test_a_config_that_does_not_say_its_context(tmp_path: Path) -> None:
    write_config(tmp_path, {"hidden_size": 8})
    with pytest.raises(ParamsError, match=r"expected one of max_position_embeddings, .*got none"):
        check_model(experiment("model"), tmp_path)


def test_a_model_from_scratch_is_checked_by_the_schema(tmp_path: Path) -> None:
    check_model(Experiment(), tmp_path)
