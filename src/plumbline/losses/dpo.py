"""The loss of direct preference optimisation."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


class DPOStats(NamedTuple):
    """Sums over the pairs of a micro-batch; divide by the pairs of all of them."""

    accuracy: Tensor
    """1 where the chosen response has the higher implicit reward."""
    margin: Tensor
    """Implicit reward of the chosen less that of the rejected response."""
    chosen_reward: Tensor
    """beta * (log pi - log ref) of the chosen response."""
    rejected_reward: Tensor
    """The same of the rejected response."""


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    num_pairs: Tensor | int | None = None,
) -> tuple[Tensor, DPOStats]:
    """DPO's loss of pairs of responses.

    L = mean(-(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)),
    h = beta * ((log pi_c - log ref_c) - (log pi_r - log ref_r))
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; eps: Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO").

    Args:
        chosen_logprobs: [B], log-probabilities of the whole preferred responses under the policy
            that is being trained, nats.
        rejected_logprobs: [B], of the others.
        ref_chosen: [B], of the preferred responses under the reference.
        ref_rejected: [B], of the others.
        beta: strength of the pull to the reference.
        label_smoothing: eps, the assumed share of wrong labels.
        num_pairs: of the whole mini-batch, where this is one micro-batch of it; none counts here.
    """
    chosen_reward = beta * (chosen_logprobs - ref_chosen)
    rejected_reward = beta * (rejected_logprobs - ref_rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * logsigmoid(margin)
    if label_smoothing:
        loss = loss - label_smoothing * logsigmoid(-margin)
    stats = DPOStats(
        accuracy=(margin > 0).float().sum(),
        margin=margin.sum(),
        chosen_reward=chosen_reward.sum(),
        rejected_reward=rejected_reward.sum(),
    )
    total = len(margin) if num_pairs is None else num_pairs
    return loss.sum() / total, DPOStats(*(value.detach() for value in stats))
