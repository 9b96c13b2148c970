"""How fast a training is, and how near that is to what the machine can do."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumbline.training.precision import Precision

MEASURED_S = 0.3
"""Seconds of matrix products that the machine's rate is read from."""


@dataclass(frozen=True)
class Work:
    """What was done in some time."""

    tokens: int = 0
    """Real ones that a model read."""
    computed: int = 0
    """The same with the padding that it read."""
    flops: float = 0.0
    """Floating-point operations on real tokens."""

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        return Work(
            self.tokens + other.tokens, self.computed + other.computed, self.flops + other.flops
        )

    def numbers(self) -> list[float]:
        """For a checkpoint: `Work(*numbers)` is the same again."""
        return [self.tokens, self.computed, self.flops]

    def metrics(self, seconds: float, rate: float) -> dict[str, float]:
        """`perf/…` of work that took so many seconds where matrix products run at `rate` FLOP/s."""
        return {
            "perf/flops_per_s": self.flops / seconds,
            "perf/mfu": self.flops / seconds / rate,
            "perf/padding_share": 1 - self.tokens / max(self.computed, 1),
        }


class Pace:
    """How fast a training goes between two logs."""

    def __init__(self, rate: float) -> None:
        """Nothing is done yet; matrix products run at `rate` FLOP/s."""
        self.rate = rate
        self.restart()

    def restart(self) -> None:
        """Forget what was done so far."""
        self.work, self.rows = Work(), 0
        self.since = time.perf_counter()

    def add(self, work: Work, rows: int) -> None:
        """Note what was done."""
        self.work += work
        self.rows += rows

    def take(self) -> dict[str, float]:
        """`perf/…` and `time/…` since the last call."""
        seconds = time.perf_counter() - self.since
        metrics = {
            "perf/tokens_per_s": self.work.tokens / seconds,
            "perf/rows_per_s": self.rows / seconds,
            **self.work.metrics(seconds, self.rate),
            "time/update_s": seconds,
        }
        self.restart()
        return metrics


class Cost(NamedTuple):
    """Multiplications of a model's matrices, from which floating-point operations are counted.

    A weight costs 2 operations a token in the forward pass, 2 for the gradient of what it
    multiplies, and 2 for its own where it is trained (Kaplan et al. 2020, arXiv 2001.08361, section
    2.1). What is recomputed, and what is no matrix product, does not count.
    """

    trunk: int
    """Weights of the matrices that each token passes, embeddings and head left out."""
    trunk_trained: int
    """Those of them that are trained."""
    head: int
    """Weights of the head, which only tokens that predict pass."""
    head_trained: int
    """The same where they are trained."""
    attention: int
    """Multiplications of a token with one that it looks at, in all layers."""

    @classmethod
    def of(cls, model: nn.Module) -> "Cost":
        """The cost of a language model or a scalar model, or of what wraps one."""
        inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        head = None if inner is None else inner.get_output_embeddings()
        trunk = trunk_trained = 0
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                trunk += module.weight.numel()
                trunk_trained += module.weight.numel() * module.weight.requires_grad
        if head is None:
            return cls(trunk, trunk_trained, 0, 0, _attention(inner))
        size, trained = head.weight.numel(), head.weight.requires_grad
        return cls(trunk, trunk_trained, size, size * trained, _attention(inner))

    def forward(self, lengths: Sequence[int], predicting: int) -> float:
        """FLOPs of a forward pass over sequences, of which so many tokens predict one."""
        return 2.0 * (
            self.trunk * sum(lengths) + self.head * predicting + self.attention * _pairs(lengths)
        )

    def training(self, lengths: Sequence[int], predicting: int) -> float:
        """FLOPs of a forward and a backward pass."""
        weights = self.trunk_trained * sum(lengths) + self.head_trained * predicting
        attention = self.attention * _pairs(lengths)
        return 2 * self.forward(lengths, predicting) + 2.0 * (weights + attention)


@cache
def matmul_rate(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large matrix product on the device: the best of a short time's tries.

    It is measured once a process.
    """
    size = 8192 if device.type == "cuda" else 1024
    width = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.ones(size, size, device=device, dtype=width)
    begin = time.perf_counter()
    best = float("inf")
    # The first one is slower: it wakes the threads.
    for _ in range(1000):
        started = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended - begin > MEASURED_S:
            break
    return 2.0 * size**3 / best


def _attention(model: PreTrainedModel | None) -> int:
    if model is None:
        return 0
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Query with key, and weight with value.
    return int(2 * heads * head * config.num_hidden_layers)


def _pairs(lengths: Sequence[int]) -> int:
    """How often a token looks at one: itself and those before it."""
    return sum(length * (length + 1) // 2 for length in lengths)
