"""The clipped value loss of PPO."""

from typing import NamedTuple

import torch
from torch import Tensor

from plumbline.ops.masked import masked_sum


class ValueStats(NamedTuple):
    """Sums over the real tokens of a micro-batch; divide by the tokens of all of them."""

    clip_fraction: Tensor
    """1 where clipping decides the loss."""


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    cliprange: float,
    num_tokens: int,
) -> tuple[Tensor, ValueStats]:
    """Clipped squared error of the values, averaged over the real tokens of the mini-batch.

    L = 1/(2N) * sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t - eps, V_old_t + eps) - R_t)^2)
    (Huang et al. 2024, arXiv 2403.17031; the clip is that of OpenAI's baselines).

    Args:
        values: [B, T], of the critic that is being trained.
        old_values: [B, T], of the critic at the time of the rollout.
        returns: [B, T].
        response_mask: bool [B, T].
        cliprange: eps.
        num_tokens: N, the real tokens of all micro-batches of the mini-batch.
    """
    zeros = torch.zeros_like(values)
    values = torch.where(response_mask, values, zeros)
    old_values = torch.where(response_mask, old_values, zeros)
    returns = torch.where(response_mask, returns, zeros)
    clipped_values = values.clamp(old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(unclipped, clipped), response_mask) / num_tokens
    stats = ValueStats(clip_fraction=masked_sum((clipped > unclipped).float(), response_mask))
    return loss, ValueStats(*(value.detach() for value in stats))
