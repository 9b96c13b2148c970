"""Sizes of matrix products, where each new one costs time."""

import torch

MULTIPLE = 64
"""Of which sizes are made: 16 and 32 leave too many of them (docs/lab-log.md)."""


def size_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """What to round sizes of matrix products up to a multiple of; 1: they are left alone.

    In bf16 on a CPU torch has oneDNN compile a product for each size that it has not seen lately,
    which takes as long as to multiply some hundred tokens.
    """
    return MULTIPLE if device.type == "cpu" and dtype == torch.bfloat16 else 1


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what products of numbers of this dtype are made: autocast's where it is on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
