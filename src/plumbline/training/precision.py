"""The width of the numbers in matrix products."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def resolve_precision(asked: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What `auto` means on a device: bf16 where its matrix units take it, else fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in bf16 where that is the precision; sums and weights stay in fp32.

    Gradients are taken outside of it, and a context is left before weights change: it keeps
    their narrow copies until then.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
