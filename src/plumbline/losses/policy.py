"""The clipped policy loss, which all algorithms share."""

from typing import NamedTuple

import torch
from torch import Tensor

from plumbline.ops.masked import masked_sum


class PolicyStats(NamedTuple):
    """Sums over the real tokens of a micro-batch, to be divided by the tokens of all of them."""

    approx_kl: Tensor
    """(logp - logp_old)^2 / 2, Schulman's k2 of KL(old || new)."""
    clip_fraction: Tensor
    """1 where clipping decides the loss."""
    ratio: Tensor
    """pi / pi_old."""
    ratio_max: Tensor
    """The largest pi / pi_old: not a sum."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float,
    num_tokens: int,
    cliprange_high: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate, averaged over the real tokens of the whole mini-batch.

    L = 1/N * sum_t max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - eps, 1 + eps_high)),
    ratio_t = exp(logp_t - logp_old_t) (Schulman et al. 2017, arXiv 1707.06347, eq. 7;
    eps_high: Yu et al. 2025, arXiv 2503.14476, eq. 10).

    Args:
        logprobs: [B, T], of the policy that is being trained.
        old_logprobs: [B, T], of the policy that drew the tokens.
        advantages: [B, T].
        response_mask: bool [B, T].
        cliprange: eps.
        num_tokens: N, the real tokens of all micro-batches of the mini-batch, so that the
            gradient does not depend on how the mini-batch was split.
        cliprange_high: eps_high; none takes eps.
    """
    # Masked before exp: a pad's log-probability may be -inf or NaN, and inf * 0 would be NaN.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    high = cliprange if cliprange_high is None else cliprange_high
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss = masked_sum(torch.maximum(unclipped, clipped), response_mask) / num_tokens
    stats = PolicyStats(
        approx_kl=masked_sum(0.5 * log_ratio.square(), response_mask),
        clip_fraction=masked_sum((clipped > unclipped).float(), response_mask),
        ratio=masked_sum(ratio, response_mask),
        ratio_max=torch.where(response_mask, ratio, torch.zeros_like(ratio)).amax(),
    )
    return loss, PolicyStats(*(value.detach() for value in stats))
