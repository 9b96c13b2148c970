"""Advantages and returns from token rewards."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over padded responses.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1};
    returns_t = A_t + V_t, with V and A 0 after the last real token
    (Schulman et al. 2015, arXiv 1506.02438, eq. 16; t counts tokens).

    Args:
        rewards: [B, T].
        values: [B, T], V_t read at the position that predicts token t.
        response_mask: bool [B, T]; each row True from the first token to the last real one.
        gamma: discount a token.
        gae_lambda: 0 gives the TD error, 1 the reward-to-go less the value (with gamma = 1).

    Returns:
        Advantages and returns, both [B, T] and 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.
    """
    if not rewards.shape == values.shape == response_mask.shape:
        raise ValueError(
            "gae: expected rewards, values and response_mask of one shape, got "
            f"{tuple(rewards.shape)}, {tuple(values.shape)}, {tuple(response_mask.shape)}"
        )
    zeros = torch.zeros_like(values)
    rewards = torch.where(response_mask, rewards, zeros)
    values = torch.where(response_mask, values, zeros)
    advantage = zeros[:, 0]
    next_value = zeros[:, 0]
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Past the end delta is 0 and so is the running advantage: no mask is needed here.
        advantage = delta + gamma * gae_lambda * advantage
        next_value = values[:, t]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, torch.where(response_mask, advantages + values, zeros)
