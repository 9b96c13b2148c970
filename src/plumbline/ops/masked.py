"""Means, variances and whitening over the real tokens of a padded batch."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` where `mask` is True; what stands elsewhere, NaN included, has no effect.

    Args:
        x: any shape.
        mask: bool, the shape of `x`; True counts.
        dim: the dimension to sum over; none sums over all.
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the True entries of `mask`, a scalar.

    Raises:
        ValueError: no entry counts, so that there is no mean.
    """
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_mean: expected at least one True in the mask, got none")
    return masked_sum(x, mask) / count


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of `x` over the True entries of `mask`, a scalar.

    Raises:
        ValueError: fewer than two entries count.
    """
    count = mask.sum()
    if count < 2:
        raise ValueError(f"masked_var: expected at least 2 True in the mask, got {int(count)}")
    centred = torch.where(mask, x - masked_mean(x, mask), torch.zeros_like(x))
    return masked_sum(centred * centred, mask) / (count - 1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the real entries of `x` to variance 1 and, if asked, shift them to mean 0.

    (x - mean) / sqrt(var + eps), plus the mean again unless `shift_mean`. Masked entries are 0.

    Args:
        x: any shape.
        mask: bool, the shape of `x`; True counts.
        shift_mean: True moves the mean to 0 (advantages), False keeps it (rewards).
        eps: added to the variance.
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
