"""Models and prompts for the measured processes, from a prepared folder or with random weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from benchmarks.speed.worker import Result, Spec, peak_mb, rows_of
from plumbline.data.tokenize import ChatEncoder
from plumbline.models.load import load_lm
from plumbline.models.scalar_head import load_scalar_model, scalar_model_from_lm
from plumbline.training.models import Models
from plumbline.training.precision import Precision, hold_narrow


class Prompts:
    """A ChatEncoder of prompts that are encoded already; a prompt is its number, as text."""

    def __init__(
        self, queries: Sequence[list[int]], stop_token_ids: Sequence[int], pad_token_id: int
    ) -> None:
        """Hand these queries out."""
        self.queries = queries
        self.stop_token_ids = tuple(stop_token_ids)
        self.pad_token_id = pad_token_id

    @classmethod
    def of(cls, spec: Spec) -> "Prompts":
        """Those of the spec's model."""
        rows = rows_of(spec["model"])
        return cls(rows["queries"], [rows["end"]], rows["pad"])

    @property
    def names(self) -> list[str]:
        """What to pass as prompts."""
        return [str(number) for number in range(len(self.queries))]

    def prompts(self, names: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts."""
        return [self.queries[int(name)] for name in names]

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """No reward function reads them."""
        return [""] * len(responses)

    def encoder(self) -> ChatEncoder:
        """Itself, as the functions that train want to see it."""
        return cast(ChatEncoder, self)


def language_model(model: Spec, device: torch.device) -> PreTrainedModel:
    """The policy's weights, in float32."""
    if "folder" in model:
        return load_lm(Path(model["folder"], "sft")).to(device).eval()
    return _random(LlamaForCausalLM, model["shape"], device)


def scalar_model(model: Spec, device: torch.device) -> PreTrainedModel:
    """The reward model's."""
    if "folder" in model:
        return load_scalar_model(Path(model["folder"], "reward")).to(device).eval()
    return _random(LlamaForSequenceClassification, model["shape"], device)


def fresh_scalar_model(model: Spec, device: torch.device) -> PreTrainedModel:
    """The policy's weights with a new scalar head, to become a reward model."""
    if "folder" in model:
        return scalar_model_from_lm(Path(model["folder"], "sft"), seed=0).to(device)
    return scalar_model(model, device)


def _random(kind: Any, shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return cast(PreTrainedModel, kind(LlamaConfig(**shape, num_labels=1)).eval())


def ppo_models(model: Spec, device: torch.device, precision: Precision) -> Models:
    """Policy, reference, reward model and a critic of its own, as the step `rl` loads them."""
    policy, critic = language_model(model, device), scalar_model(model, device)
    if "folder" in model:
        ref_policy, reward_model = language_model(model, device), scalar_model(model, device)
    else:
        ref_policy, reward_model = copy.deepcopy(policy), copy.deepcopy(critic)
    return Models(
        policy, hold_narrow(ref_policy, precision), hold_narrow(reward_model, precision), critic
    )


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> Result:
    """The most that was held so far: by the process, and on the GPU where there is one. MB."""
    held = {"peak_mb": peak_mb()}
    if torch.cuda.is_available():
        held["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return held
