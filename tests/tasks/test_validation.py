"""Tests of tasks.validation."""

import pandas as pd
import pytest

from plumbline.data.splits import with_prompt_ids
from plumbline.data.tables import store_rows, tables_of
from plumbline.data.tokenize import train_tokenizer
from plumbline.data.validation import Limits
from plumbline.params.schema import DataParams, LocalModel, ScratchModel
from tasks import validation


@pytest.fixture
def tables(tmp_path):
    def tables(response):
        prompts = ['[{"role":"user","content":"fold the sheet"}]', None]
        rows = {"prompt": prompts, "response": [response, "x"], "split": ["train", "train"]}
        frame = with_prompt_ids(pd.DataFrame({"row": [1, 2]} | rows))
        return tables_of([store_rows("demonstrations", "d.jsonl", [frame], tmp_path)], 0.5)

    return tables


def test_the_limits_are_those_of_the_params():
    params = DataParams(max_prompt_tokens=7, max_response_tokens=9)
    assert validation.limits_of(params) == Limits(7, 9)


def test_a_tokenizer_from_scratch_learns_the_tables_that_are_counted(tmp_path, tables):
    counter_for = validation.token_counter(ScratchModel(vocab_size=300), tmp_path)
    [short] = counter_for(tables("paper plane " * 50)).response_lengths(["paper plane"])
    [long] = counter_for(tables("river")).response_lengths(["paper plane"])
    assert short < long


def test_a_pretrained_tokenizer_is_loaded_once(tmp_path, tables, monkeypatch):
    loads = []

    def load(model, root, texts):
        loads.append((model, root, texts))
        return train_tokenizer(["fold"], 300)

    monkeypatch.setattr(validation, "base_tokenizer", load)
    model = LocalModel(source="local", path="m")
    counter_for = validation.token_counter(model, tmp_path)
    assert loads == []
    assert counter_for(tables("a")) is counter_for(tables("b"))
    assert loads == [(model, tmp_path, [])]
