"""The width of the numbers in matrix products."""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumbline.models.packed_attention import take_packed

Precision = Literal["fp32", "bf16"]


def resolve_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What `auto` means on a device: bf16 where its matrix units take it, else fp32.

    On a CPU that is AMX. With the dot products of avx512_bf16 alone, bf16 is half as fast as fp32
    (ADR 0009).
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in bf16 where that is the precision; sums and weights stay in fp32.

    Gradients are taken outside of it, and a context is left before weights change: it keeps
    their narrow copies until then.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def hold_narrow(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Let a model that is never trained hold its matrices as narrow as autocast makes them.

    It says the same to the last bit, in nearly half the memory and without a copy at each use.
    Embeddings, norms and heads stay in fp32. Changes the model, and returns it.
    """
    if precision == "bf16":
        # It tries that out, for which all weights have to be of one width.
        take_packed(model)
        for module in getattr(model, model.base_model_prefix).modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight.requires_grad_(False)
                module.weight.data = module.weight.data.bfloat16()
    return model
