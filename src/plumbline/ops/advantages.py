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


def discounted_returns(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on.

    G_t = r_t + gamma * G_{t+1} (Sutton & Barto 2018, eq. 3.9).

    Args:
        rewards: [B, T].
        response_mask: bool [B, T].
        gamma: discount a token.

    Returns:
        [B, T]; 0 where the mask is False.
    """
    rewards = torch.where(response_mask, rewards, torch.zeros_like(rewards))
    total = torch.zeros_like(rewards[:, 0])
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        backwards.append(total)
    returns = torch.stack(backwards[::-1], 1)
    return torch.where(response_mask, returns, torch.zeros_like(returns))


def leave_one_out(returns: Tensor, responses_per_prompt: int) -> Tensor:
    """RLOO: a response's return less the mean return of the other responses to its prompt.

    A_i = R_i - 1/(K-1) * sum_{j != i} R_j (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7).

    Args:
        returns: [B], the K responses to a prompt side by side.
        responses_per_prompt: K.

    Raises:
        ValueError: K is less than 2, or does not divide B.
    """
    groups = _groups(returns, responses_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (responses_per_prompt - 1)
    return (groups - others).flatten()


def standardise_groups(returns: Tensor, responses_per_prompt: int, eps: float = 1e-4) -> Tensor:
    """GRPO: returns standardised over the responses to a prompt.

    A_i = (R_i - mean(R)) / (std(R) + eps) (Shao et al. 2024, arXiv 2402.03300, section 4.1.2);
    0 where the responses to a prompt all have the same return.

    Args:
        returns: [B], the K responses to a prompt side by side.
        responses_per_prompt: K.
        eps: added to the (unbiased) standard deviation.

    Raises:
        ValueError: K is less than 2, or does not divide B.
    """
    groups = _groups(returns, responses_per_prompt)
    centred = groups - groups.mean(1, keepdim=True)
    # The mean of equal numbers can miss them by a rounding, which a small eps would magnify.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    return (centred / (groups.std(1, keepdim=True) + eps)).flatten()


def _groups(returns: Tensor, responses_per_prompt: int) -> Tensor:
    if responses_per_prompt < 2 or len(returns) % responses_per_prompt:
        raise ValueError(
            "responses_per_prompt: expected at least 2 that divide the responses, got "
            f"{responses_per_prompt} for {len(returns)}"
        )
    return returns.view(-1, responses_per_prompt)
