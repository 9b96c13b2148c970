"""Tests of plumbline.training.memory."""

from typing import Any

import psutil
import pytest
import torch

from plumbline.errors import TrainingError
from plumbline.training.memory import memory_advice, release_memory

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


def test_only_a_full_memory_is_advised_on():
    says = r"^rl: the GPU's memory is full \(full\)\. To go on: lower x; or free"
    with pytest.raises(TrainingError, match=says), memory_advice("rl", ["lower x"]):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(ZeroDivisionError), memory_advice("rl", []):
        raise ZeroDivisionError
