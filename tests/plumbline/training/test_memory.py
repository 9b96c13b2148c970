"""Tests of plumbline.training.memory."""

import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.training.memory import checkpointing, memory_advice, release_memory

MIB = 2**20


def resident() -> float:
    """Memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss / MIB)


def test_what_refers_to_itself_is_given_back():
    # Of a size that the C library takes from its heap, with a last one that keeps the heap large.
    parts: list[Any] = [torch.ones(16 * 1024) for _ in range(4800)]
    last = torch.ones(16 * 1024)
    parts.append(parts)
    full = resident()
    del parts

    release_memory()

    assert full - resident() > 250
    assert float(last.sum()) == 16 * 1024


GROWTH = """
import psutil, torch
import plumbline.training.memory
weight = torch.randn(256, 688).bfloat16()
held = []
for rows in range(1, 601):
    torch.randn(rows, 256).bfloat16() @ weight
    if rows % 300 == 0:
        held.append(psutil.Process().memory_info().rss / 2**20)
print(held[1] - held[0])
"""


def test_products_of_ever_new_shapes_do_not_fill_the_memory() -> None:
    # 195 MiB with torch's own limits, where the CPU is fast at bf16; elsewhere nothing is kept.
    own = {name: value for name, value in os.environ.items() if not name.endswith("_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], env=own, capture_output=True, text=True, timeout=120
    )

    assert float(done.stdout) < 15, done.stderr


def test_limits_that_a_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    code = (
        "import os, plumbline.training.memory\n"
        "print(os.environ['LRU_CACHE_CAPACITY'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)

    assert done.stdout.split() == ["7", "32"], done.stderr


def test_only_a_full_memory_is_advised_on():
    says = r"^rl: the GPU's memory is full \(full\)\. To go on: lower x; or free"
    with pytest.raises(TrainingError, match=says), memory_advice("rl", ["lower x"]):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(ZeroDivisionError), memory_advice("rl", []):
        raise ZeroDivisionError


def test_checkpointing_recomputes_only_inside_its_context(
    lm: PreTrainedModel, scorer: PreTrainedModel
) -> None:
    wrapped = nn.ModuleDict({"inside": lm})
    scorer.train()
    ids = torch.tensor([[5, 6, 7]])
    forwards: list[str] = []
    for name, model in (("lm", lm), ("scorer", scorer)):
        layer = model.transformer.h[0].ln_1
        layer.register_forward_hook(lambda *_, name=name: forwards.append(name))

    def gradient() -> tuple[Tensor, Tensor]:
        forwards.clear()
        lm.zero_grad()
        scorer.zero_grad()
        (lm(ids).logits.sum() + scorer(ids).logits.sum()).backward()
        return lm.transformer.wte.weight.grad.clone(), scorer.transformer.wte.weight.grad.clone()

    expected = gradient()
    assert sorted(forwards) == ["lm", "scorer"]
    with checkpointing(wrapped, scorer):
        for mine, whole in zip(gradient(), expected, strict=True):
            torch.testing.assert_close(mine, whole, atol=1e-6, rtol=1e-6)
        assert sorted(forwards) == ["lm", "lm", "scorer", "scorer"]
    for mine, whole in zip(gradient(), expected, strict=True):
        assert torch.equal(mine, whole)
    assert sorted(forwards) == ["lm", "scorer"]


def test_checkpointing_leaves_models_as_they_were(
    lm: PreTrainedModel, scorer: PreTrainedModel
) -> None:
    scorer.train()
    for failing in (False, True):
        with suppress(KeyError), checkpointing(lm, scorer):
            assert lm.is_gradient_checkpointing
            assert all(module.training for module in lm.modules())
            if failing:
                raise KeyError
        for model, training in ((lm, False), (scorer, True)):
            assert not model.is_gradient_checkpointing
            assert all(module.training == training for module in model.modules())
            assert not model.get_input_embeddings()._forward_hooks


def test_checkpointing_of_what_is_no_transformer_changes_nothing() -> None:
    with checkpointing(nn.Linear(1, 1)):
        pass
