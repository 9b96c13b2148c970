"""Which token gets how much credit: the only place in which the RL algorithms differ."""

from typing import NamedTuple

import torch
from torch import Tensor

from plumbline.ops.advantages import (
    discounted_returns,
    gae,
    leave_one_out,
    standardise_groups,
)
from plumbline.ops.masked import masked_sum, whiten
from plumbline.params.schema import RLParams


class Credit(NamedTuple):
    """Advantages of a rollout, and the returns that its critic learns."""

    advantages: Tensor
    """[B, T]; 0 where the mask is False."""
    returns: Tensor | None
    """[B, T]; none without a critic."""


class Baseline:
    """What REINFORCE takes from the returns, so that they vary less (Williams 1992, section 4)."""

    def __init__(self, params: RLParams) -> None:
        self.kind = params.baseline
        self.decay = params.baseline_decay
        self.average: float | None = None

    def of(self, returns: Tensor) -> float:
        """The baseline of a rollout with these sequence returns [B]; keeps the moving average.

        The moving average is that of the earlier rollouts; the first one has only its own mean.
        """
        if self.kind == "none":
            return 0.0
        mean = float(returns.mean())
        if self.kind == "mean":
            return mean
        baseline = mean if self.average is None else self.average
        self.average = self.decay * baseline + (1 - self.decay) * mean
        return baseline


def assign_credit(
    rewards: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    params: RLParams,
    baseline: Baseline,
) -> Credit:
    """Turn token rewards into advantages, as `params.algorithm` does.

    ppo: GAE. reinforce: discounted return from each token on, less the baseline. rloo and grpo:
    the whole return of a response, against the other responses to its prompt, for each token.

    Args:
        rewards: [B, T]; the responses to a prompt stand side by side.
        values: [B, T], of the critic; for ppo.
        response_mask: bool [B, T].
        params: section `rl`.
        baseline: of reinforce.
    """
    if params.algorithm in ("ppo", "reinforce") and params.whiten_rewards:
        rewards = whiten(rewards, response_mask, shift_mean=False)
    sums = masked_sum(rewards, response_mask, 1)
    returns: Tensor | None = None
    match params.algorithm:
        case "ppo":
            assert values is not None
            advantages, returns = gae(
                rewards, values, response_mask, params.gamma, params.gae_lambda
            )
        case "reinforce":
            onwards = discounted_returns(rewards, response_mask, params.gamma)
            advantages = _spread(onwards - baseline.of(onwards[:, 0]), response_mask)
        case "rloo":
            whole = leave_one_out(sums, params.responses_per_prompt)
            advantages = _spread(whole.unsqueeze(1), response_mask)
        case "grpo":
            whole = standardise_groups(sums, params.responses_per_prompt)
            advantages = _spread(whole.unsqueeze(1), response_mask)
    # GRPO's are standardised already.
    if params.algorithm != "grpo" and params.whiten_advantages:
        advantages = whiten(advantages, response_mask)
    return Credit(advantages, returns)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))
