"""From one score a response to one reward a token."""

from typing import Literal

import torch
from torch import Tensor


def penalise_missing_eos(
    scores: Tensor, has_eos: Tensor, treatment: Literal["replace", "subtract"], constant: float
) -> Tensor:
    """Change the score of the responses that no end token closes.

    replace: the score becomes `constant` (Huang et al. 2024, arXiv 2403.17031).
    subtract: the score loses `constant`.

    Args:
        scores: [B].
        has_eos: bool [B].
    """
    match treatment:
        case "replace":
            changed = torch.full_like(scores, constant)
        case "subtract":
            changed = scores - constant
        case _:
            raise ValueError(f"treatment: expected replace or subtract, got {treatment!r}")
    return torch.where(has_eos, scores, changed)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Penalise every token by its KL, and add the score at the last real token.

    r_t = -kl_coef * kl_t + [t is the last real token] * score
    (Stiennon et al. 2020, arXiv 2009.01325, section 3.4, spread over the tokens).

    Args:
        scores: [B], one a response.
        kl: [B, T], nats a token.
        response_mask: bool [B, T]; each row True from the first token to the last real one.
        kl_coef: beta.

    Returns:
        [B, T]; 0 where the mask is False.

    Raises:
        ValueError: a response has no real token, so that its score has no place.
    """
    lengths = response_mask.sum(1)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"token_rewards: expected a real token in each response, row {row} has 0")
    rewards = torch.where(response_mask, -kl_coef * kl, torch.zeros_like(kl))
    last = (lengths - 1).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype))
