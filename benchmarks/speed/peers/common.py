"""What the peers' processes share: models, versions, memory of a GPU."""

from importlib.metadata import version
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.speed.worker import Result, Spec, peak_mb


def device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def language_model(spec: Spec, dtype: torch.dtype) -> PreTrainedModel:
    """The policy's weights, from a folder, or random ones of a given shape."""
    if "folder" in spec:
        folder = f"{spec['folder']}/sft"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device())
    return _random(LlamaForCausalLM, spec["shape"]).to(dtype)


def scalar_model(spec: Spec, dtype: torch.dtype) -> PreTrainedModel:
    """The reward model's, likewise."""
    if "folder" in spec:
        folder = f"{spec['folder']}/reward"
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        return model.to(device())
    return _random(LlamaForSequenceClassification, spec["shape"]).to(dtype)


def fresh_scalar_model(spec: Spec) -> PreTrainedModel:
    """The policy's weights with a new scalar head, to become a reward model."""
    if "folder" not in spec:
        return scalar_model(spec, torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(
        f"{spec['folder']}/sft", num_labels=1, dtype=torch.float32
    )
    return model.to(device())


def _random(kind: Any, shape: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device()):
        return kind(LlamaConfig(**shape, num_labels=1))


def tokenizer(spec: Spec) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder; for random weights one that only pads and ends."""
    if "folder" in spec:
        return AutoTokenizer.from_pretrained(f"{spec['folder']}/sft")
    words = WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def memory() -> Result:
    """The most that was held so far: by the process, and on the GPU where there is one. MB."""
    held = {"peak_mb": peak_mb()}
    if torch.cuda.is_available():
        held["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return held


def setup() -> Result:
    """What was measured with."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"packages": packages, "threads": torch.get_num_threads()}
