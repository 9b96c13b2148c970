"""Who gets how much credit, by hand and by naive loops in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plumbline.params.schema import RLParams
from plumbline.training.credit import Baseline, Credit, assign_credit

MASK = torch.tensor([[True, True, True], [True, False, False]])
REWARDS = torch.tensor([[1.0, 2.0, 4.0], [6.0, 0.0, 0.0]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, 1.5], [2.0, 9.0, 9.0]], dtype=torch.float64)


def rl_params(algorithm: str, **changes: Any) -> RLParams:
    defaults: dict[str, Any] = {"whiten_advantages": False} if algorithm != "grpo" else {}
    return RLParams(algorithm=algorithm, **{**defaults, **changes})  # type: ignore[arg-type]


def credit_of(
    params: RLParams,
    rewards: Tensor = REWARDS,
    mask: Tensor = MASK,
    values: Tensor | None = None,
) -> Credit:
    return assign_credit(rewards, values, mask, params, Baseline(params))


def rows(column: Tensor | None) -> list[list[float]]:
    assert column is not None
    assert column.dtype == torch.float64
    return [pytest.approx(row, rel=1e-12, abs=1e-12) for row in column.tolist()]


def variance(values: list[float]) -> float:
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


# ppo


def test_ppo_is_gae_by_hand() -> None:
    # gamma 0.9, lambda 0.8, so 0.72.
    # Row 0: delta 4 - 1.5 = 2.5; 2 + 0.9 * 1.5 - 1 = 2.35; 1 + 0.9 * 1 - 0.5 = 1.4.
    # A 2.5; 2.35 + 0.72 * 2.5 = 4.15; 1.4 + 0.72 * 4.15 = 4.388. Row 1: 6 - 2 = 4.
    params = rl_params("ppo", gamma=0.9, gae_lambda=0.8)
    advantages, returns = credit_of(params, values=VALUES)
    assert rows(advantages) == [[4.388, 4.15, 2.5], [4, 0, 0]]
    assert rows(returns) == [[4.888, 5.15, 4], [6, 0, 0]]


def test_ppos_returns_are_those_before_whitening() -> None:
    params = rl_params("ppo", gamma=0.9, gae_lambda=0.8, whiten_advantages=True)
    advantages, returns = credit_of(params, values=VALUES)
    raw = [4.388, 4.15, 2.5, 4]
    mean, std = math.fsum(raw) / 4, math.sqrt(variance(raw) + 1e-8)
    a, b, c, d = ((value - mean) / std for value in raw)
    assert [[a, b, c], [d, 0, 0]] == rows(advantages)
    assert rows(returns) == [[4.888, 5.15, 4], [6, 0, 0]]


# reinforce


@pytest.mark.parametrize(
    ("baseline", "taken"),
    # The returns of the two sequences are 3 and 6.
    [("none", 0), ("mean", 4.5), ("moving_average", 4.5)],
)
def test_reinforce_is_the_discounted_return_less_the_baseline(baseline: str, taken: float) -> None:
    # gamma 0.5: 1 + 0.5 * 2 + 0.25 * 4 = 3; 2 + 0.5 * 4 = 4; 4.
    params = rl_params("reinforce", baseline=baseline, gamma=0.5)
    advantages, returns = credit_of(params)
    assert [[3 - taken, 4 - taken, 4 - taken], [6 - taken, 0, 0]] == rows(advantages)
    assert returns is None


def test_reinforce_may_be_whitened() -> None:
    params = rl_params("reinforce", gamma=0.5, whiten_advantages=True)
    raw = [3, 4, 4, 6]
    std = math.sqrt(variance([3, 4, 4, 6]) + 1e-8)
    a, b, c, d = ((value - 4.25) / std for value in raw)
    assert [[a, b, c], [d, 0, 0]] == rows(credit_of(params).advantages)


def test_a_baseline_of_one_kind_stays_what_it_is() -> None:
    none, mean = (Baseline(rl_params("reinforce", baseline=kind)) for kind in ("none", "mean"))
    for returns, expected in (([1.0, 3.0], 2.0), ([5.0, 7.0], 6.0), ([-2.0, 0.0], -1.0)):
        assert none.of(torch.tensor(returns)) == 0
        assert mean.of(torch.tensor(returns)) == expected


def test_the_moving_average_follows_the_rollouts_before() -> None:
    # decay 0.75: the first rollout has its own mean 2; then 0.75 * 2 + 0.25 * 6 = 3;
    # 0.75 * 3 + 0.25 * -1 = 2; 0.75 * 2 + 0.25 * 10 = 4.
    params = rl_params("reinforce", baseline="moving_average", baseline_decay=0.75)
    baseline = Baseline(params)
    means = [2.0, 6.0, -1.0, 10.0, 0.0]
    seen = [baseline.of(torch.tensor([mean - 1, mean + 1])) for mean in means]
    assert seen == [2, 2, 3, 2, 4]


def test_one_baseline_serves_all_rollouts_of_a_run() -> None:
    params = rl_params("reinforce", baseline="moving_average", baseline_decay=0.5)
    baseline = Baseline(params)
    mask = torch.tensor([[True], [True]])
    taken = []
    for rewards in ([[1.0], [3.0]], [[5.0], [7.0]], [[0.0], [0.0]]):
        advantages, _ = assign_credit(torch.tensor(rewards), None, mask, params, baseline)
        taken.append(rewards[0][0] - float(advantages[0, 0]))
    assert taken == [2, 2, 4]


# rloo and grpo

GROUPS_OF_3 = {
    "responses_per_prompt": 3, "episodes": 6, "rollout_batch_size": 6, "mini_batch_size": 6,
}  # fmt: skip
GROUP_MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
# Whole returns 1, 5, 6 of the first prompt, 2, 2, 2 of the second.
GROUPS = torch.tensor(
    [[-1.0, 2.0], [5.0, 0.0], [2.0, 4.0], [2.0, 0.0], [-1.0, 3.0], [0.5, 1.5]], dtype=torch.float64
)


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # 1 - (5 + 6) / 2 = -4.5; 5 - 3.5 = 1.5; 6 - 3 = 3; and 0 where all are the same.
    params = rl_params("rloo", **GROUPS_OF_3)
    advantages, returns = credit_of(params, GROUPS, GROUP_MASK)
    assert rows(advantages) == [[-4.5, -4.5], [1.5, 0], [3, 3], [0, 0], [0, 0], [0, 0]]
    assert returns is None


def test_rloo_may_be_whitened() -> None:
    params = rl_params("rloo", whiten_advantages=True, **GROUPS_OF_3)
    raw = [-4.5, -4.5, 1.5, 3, 3, 0, 0, 0, 0, 0]
    mean, std = math.fsum(raw) / 10, math.sqrt(variance(raw) + 1e-8)
    a, b, c, zero = ((value - mean) / std for value in (-4.5, 1.5, 3, 0))
    assert [[a, a], [b, 0], [c, c], [zero, 0], [zero, zero], [zero, zero]] == rows(
        credit_of(params, GROUPS, GROUP_MASK).advantages
    )


def test_grpo_standardises_each_group() -> None:
    # Mean 4, variance (9 + 1 + 4) / 2 = 7, and 1e-4 beside the standard deviation.
    params = rl_params("grpo", **GROUPS_OF_3)
    advantages, returns = credit_of(params, GROUPS, GROUP_MASK)
    scale = math.sqrt(7) + 1e-4
    expected = [[-3 / scale] * 2, [1 / scale, 0], [2 / scale] * 2]
    assert [*expected, [0, 0], [0, 0], [0, 0]] == rows(advantages)
    assert advantages[3:].abs().max() == 0
    assert returns is None


# What holds for all of them

ALL = ["ppo", "reinforce", "rloo", "grpo"]


def random_rollout(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of 4 responses of different lengths, 0 on the padding."""
    mask = torch.tensor([[t < length for t in range(5)] for length in (3, 5, 1, 4)])
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    return torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), mask


def settings_of(algorithm: str) -> RLParams:
    changes: dict[str, Any] = {"whiten_advantages": True} if algorithm != "grpo" else {}
    if algorithm in ("ppo", "reinforce"):
        changes |= {"gamma": 0.9, "whiten_rewards": True}
    else:
        changes |= {"responses_per_prompt": 2}
    return rl_params(algorithm, **changes)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("algorithm", ALL)
def test_what_stands_on_the_padding_has_no_effect(algorithm: str, garbage: float) -> None:
    rewards, values, mask = random_rollout(0)
    params = settings_of(algorithm)
    clean = credit_of(params, rewards, mask, values)
    dirty = credit_of(
        params, rewards.masked_fill(~mask, garbage), mask, values.masked_fill(~mask, garbage)
    )
    assert torch.equal(clean.advantages, dirty.advantages)
    assert not clean.advantages[~mask].any()
    if algorithm == "ppo":
        assert torch.equal(torch.as_tensor(clean.returns), torch.as_tensor(dirty.returns))
    # More padding.
    wide = [torch.nn.functional.pad(part, (0, 3), value=garbage) for part in (rewards, values)]
    wider = credit_of(params, wide[0], torch.nn.functional.pad(mask, (0, 3)), wide[1])
    torch.testing.assert_close(wider.advantages[:, :5], clean.advantages, rtol=1e-12, atol=1e-12)
    assert not wider.advantages[:, 5:].any()


@pytest.mark.parametrize("algorithm", ALL)
def test_the_order_of_the_prompts_has_no_effect(algorithm: str) -> None:
    rewards, values, mask = random_rollout(1)
    params = settings_of(algorithm)
    order = torch.tensor([3, 2, 0, 1])  # keeps pairs together
    straight = credit_of(params, rewards, mask, values).advantages
    shuffled = credit_of(params, rewards[order], mask[order], values[order]).advantages
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_rewards_are_scaled_and_not_shifted_where_asked(algorithm: str) -> None:
    # Rewards 1, 2, 4 and 6: mean 3.25, and the mean stays.
    std = math.sqrt(variance([1, 2, 4, 6]) + 1e-8)
    a, b, c, d = ((value - 3.25) / std + 3.25 for value in (1, 2, 4, 6))
    zeros = torch.zeros_like(VALUES)
    options = {"baseline": "none"} if algorithm == "reinforce" else {"gae_lambda": 1.0}
    params = rl_params(algorithm, whiten_rewards=True, **options)
    # With gamma 1 (and a critic that always says 0) advantages are rewards to go.
    advantages = credit_of(params, values=zeros).advantages
    assert [[a + b + c, b + c, c], [d, 0, 0]] == rows(advantages)
