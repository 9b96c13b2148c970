"""The numbers of Plumbline's PPO are those of TRL 1.12's, on trajectories that TRL recorded.

`benchmarks/record_trl_ppo.py` ran TRL's trainer and read `trl_ppo.json` off it; TRL is not needed
here, and no expected value comes from Plumbline.

Equal as they are: the response mask, the missing-EOS penalty, k1 and k3, the whitening of
advantages (unbiased variance, eps 1e-8, over the response), the policy loss with its gradient and
clip fraction, and rewards, advantages and returns of responses that fill their row.

Equal after a mapping, because TRL follows another convention:

1. Where padding follows the response, TRL adds one step: the score lands one position after the
   end token, a critic's value is read there, and rewards, returns, value loss and the whitening of
   rewards count it (`padding_mask_p1`). Plumbline gives the score to the end token and ends there.
   The same functions give TRL's numbers if `response_mask` is TRL's longer mask;
   `test_the_step_after_the_end_is_all_that_differs` says by how much the numbers differ if not.
2. TRL averages over a micro-batch, and its gradient is the plain mean over micro-batches; here a
   token weighs the same in all of them (checklist, 21). Equal if `num_tokens` is the micro-batch's.
3. TRL's approxkl is a mean over padding too, where it is 0.
4. TRL rounds n / (n - 1) of the unbiased variance to float32, in float64 models too: what it
   whitens is off by up to 3e-8 of itself.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from plumbline.losses.policy import PolicyStats, policy_loss
from plumbline.losses.value import ValueStats, value_loss
from plumbline.ops.advantages import gae
from plumbline.ops.kl import kl_estimate
from plumbline.ops.masked import whiten
from plumbline.ops.rewards import penalise_missing_eos, token_rewards

RECORDED = json.loads(Path(__file__).with_name("trl_ppo.json").read_text())
RUNS: dict[str, Any] = RECORDED["runs"]
ROLLOUTS = [(run, i) for run, content in RUNS.items() for i in range(len(content["rollouts"]))]
STEPS = [(run, i, j) for run, i in ROLLOUTS for j in range(len(RUNS[run]["rollouts"][i]["steps"]))]

# TRL ran in float64. 1e-6 would do for users, but would hide a wrong eps or a float32 in between.
TOLERANCE = 1e-11
# Where TRL has a float32 in between: in clip fractions and in whitening.
FLOAT32 = 1e-6

each_rollout = pytest.mark.parametrize(("run", "i"), ROLLOUTS)
each_step = pytest.mark.parametrize(("run", "i", "j"), STEPS)


def double(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Rollout(NamedTuple):
    """A rollout as TRL saw it; [B, T] where nothing else is said."""

    config: dict[str, Any]
    responses: Tensor
    mask: Tensor
    """True on the response: the complement of TRL's padding_mask."""
    longer_mask: Tensor
    """True one position further, where there is one: the complement of padding_mask_p1."""
    has_eos: Tensor
    """[B]."""
    scores_before_penalty: Tensor
    """[B]."""
    scores: Tensor
    """[B]."""
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    token_rewards: Tensor
    """Before whitening."""
    rewards: Tensor
    """What GAE reads."""
    values: Tensor
    advantages_before_whitening: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def read(cls, run: str, i: int, rows: Sequence[int] | slice = slice(None)) -> "Rollout":
        recorded = RUNS[run]["rollouts"][i]
        names = set(cls._fields) & set(recorded) - {"responses"}
        return cls(
            config=RUNS[run]["config"],
            responses=torch.tensor(recorded["responses"])[rows],
            mask=~torch.tensor(recorded["padding_mask"]).bool()[rows],
            longer_mask=~torch.tensor(recorded["padding_mask_p1"]).bool()[rows],
            has_eos=torch.tensor(recorded["contain_eos_token"]).bool()[rows],
            **{name: double(recorded[name])[rows] for name in names},
        )

    @property
    def full(self) -> Tensor:
        """[B], True where no padding follows the response."""
        return self.mask.all(1)


class Step(NamedTuple):
    """A backward pass of TRL's, with its rows of the rollout."""

    rows: Rollout
    new_logprobs: Tensor
    vpred: Tensor
    recorded: dict[str, Any]

    @classmethod
    def read(cls, run: str, i: int, j: int) -> "Step":
        recorded = RUNS[run]["rollouts"][i]["steps"][j]
        return cls(
            rows=Rollout.read(run, i, recorded["micro_batch_inds"]),
            new_logprobs=double(recorded["new_logprobs"]),
            vpred=double(recorded["vpred"]),
            recorded=recorded,
        )

    def policy_loss(self, new_logprobs: Tensor, num_tokens: int) -> tuple[Tensor, PolicyStats]:
        return policy_loss(
            new_logprobs,
            self.rows.logprobs,
            self.rows.advantages,
            self.rows.mask,
            cliprange=self.rows.config["cliprange"],
            num_tokens=num_tokens,
        )

    def value_loss(self, vpred: Tensor, num_tokens: int) -> tuple[Tensor, ValueStats]:
        return value_loss(
            vpred,
            self.rows.values,
            self.rows.returns,
            # Convention 1: TRL's value loss counts the step after the end.
            self.rows.longer_mask,
            cliprange=self.rows.config["cliprange_value"],
            num_tokens=num_tokens,
        )

    @property
    def policy_tokens(self) -> int:
        return int(self.rows.mask.sum())

    @property
    def value_tokens(self) -> int:
        return int(self.rows.longer_mask.sum())


def assert_equal(actual: Tensor, expected: Tensor | float, tolerance: float = TOLERANCE) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def rounding(mask: Tensor) -> float:
    """What TRL's float32 Bessel correction multiplies whitened deviations by (convention 4)."""
    exact = int(mask.sum()) / (int(mask.sum()) - 1)
    return math.sqrt(exact / float(torch.tensor(exact, dtype=torch.float32)))


# The recording


def test_the_recording_is_trl_1_12_and_has_every_case() -> None:
    assert RECORDED["recorded_with"]["trl"] == "1.12.0"
    configs = [content["config"] for content in RUNS.values()]
    assert {(config["kl_estimator"], config["whiten_rewards"]) for config in configs} == {
        ("k1", False),
        ("k1", True),
        ("k3", False),
        ("k3", True),
    }
    assert any(config["gamma"] < 1 and config["lam"] < 1 for config in configs)
    assert any(config["missing_eos_penalty"] is None for config in configs)
    assert any(config["gradient_accumulation_steps"] > 1 for config in configs)


@pytest.mark.parametrize("run", RUNS)
def test_every_run_clips_both_losses_and_has_responses_of_every_kind(run: str) -> None:
    rollouts = [Rollout.read(run, i) for i in range(len(RUNS[run]["rollouts"]))]
    ended = torch.cat([rollout.has_eos for rollout in rollouts])
    full = torch.cat([rollout.full for rollout in rollouts])
    lengths = torch.cat([rollout.mask.sum(1) for rollout in rollouts])
    assert (ended & ~full).any()
    assert (ended & full).any()
    assert (~ended & full).any()
    assert (lengths == 1).any()
    steps = [step for rollout in RUNS[run]["rollouts"] for step in rollout["steps"]]
    assert any(0 < step["pg_clipfrac"] < 1 for step in steps)
    assert any(0 < step["vf_clipfrac"] < 1 for step in steps)


@each_rollout
def test_the_response_ends_with_its_first_end_token(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    for tokens, mask, longer in zip(
        rollout.responses.tolist(), rollout.mask.tolist(), rollout.longer_mask.tolist(), strict=True
    ):
        eos = RECORDED["eos_token_id"]
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert mask == [t < length for t in range(len(tokens))]
        assert longer == [t < length + 1 for t in range(len(tokens))]


# From scores to advantages


@each_rollout
def test_missing_eos_penalty_is_subtracted_alike(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    penalty = rollout.config["missing_eos_penalty"] or 0.0
    scores = penalise_missing_eos(
        rollout.scores_before_penalty, rollout.has_eos, "subtract", penalty
    )
    assert_equal(scores, rollout.scores)


@each_rollout
def test_kl_estimates_are_equal(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, rollout.config["kl_estimator"])
    assert_equal(kl, rollout.kl)


@each_rollout
def test_token_rewards_are_equal_with_the_longer_mask(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    coefficient = rollout.config["kl_coef"]
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.longer_mask, coefficient)
    assert_equal(rewards, rollout.token_rewards)


@pytest.mark.parametrize(
    ("run", "i"), [(run, i) for run, i in ROLLOUTS if RUNS[run]["config"]["whiten_rewards"]]
)
def test_whitened_rewards_are_equal_with_the_longer_mask(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    mask = rollout.longer_mask
    rewards = whiten(rollout.token_rewards, mask, shift_mean=False)
    assert_equal(rewards, rollout.rewards, FLOAT32)
    mean = rollout.token_rewards[mask].mean()
    assert_equal((rewards - mean)[mask] * rounding(mask), (rollout.rewards - mean)[mask])


@each_rollout
def test_advantages_and_returns_are_equal_with_the_longer_mask(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    gamma, gae_lambda = rollout.config["gamma"], rollout.config["lam"]
    advantages, returns = gae(
        rollout.rewards, rollout.values, rollout.longer_mask, gamma, gae_lambda
    )
    assert_equal(advantages, rollout.advantages_before_whitening)
    assert_equal(returns, rollout.returns)


@each_rollout
def test_whitened_advantages_are_equal(run: str, i: int) -> None:
    rollout = Rollout.read(run, i)
    advantages = whiten(rollout.advantages_before_whitening, rollout.mask)
    assert_equal(advantages, rollout.advantages, FLOAT32)
    assert_equal(advantages * rounding(rollout.mask), rollout.advantages)


@each_rollout
def test_the_whole_way_from_scores_to_advantages_is_equal(run: str, i: int) -> None:
    rollout, config = Rollout.read(run, i), RUNS[run]["config"]
    mask = rollout.longer_mask
    scores = penalise_missing_eos(
        rollout.scores_before_penalty,
        rollout.has_eos,
        "subtract",
        config["missing_eos_penalty"] or 0.0,
    )
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config["kl_estimator"])
    rewards = token_rewards(scores, kl, mask, config["kl_coef"])
    if config["whiten_rewards"]:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, mask, config["gamma"], config["lam"])
    assert_equal(returns, rollout.returns, FLOAT32)
    assert_equal(whiten(advantages, rollout.mask), rollout.advantages, FLOAT32)


@each_rollout
def test_responses_that_fill_their_row_need_no_mapping(run: str, i: int) -> None:
    rollout, config = Rollout.read(run, i), RUNS[run]["config"]
    full, mask = rollout.full, rollout.mask
    rewards = token_rewards(rollout.scores, rollout.kl, mask, config["kl_coef"])
    assert_equal(rewards[full], rollout.token_rewards[full])
    # Whitened rewards depend on all the rows: TRL's serve as the input.
    advantages, returns = gae(rollout.rewards, rollout.values, mask, config["gamma"], config["lam"])
    assert_equal(advantages[full], rollout.advantages_before_whitening[full])
    assert_equal(returns[full], rollout.returns[full])


@pytest.mark.parametrize(
    ("run", "i"), [(run, i) for run, i in ROLLOUTS if not RUNS[run]["config"]["whiten_rewards"]]
)
def test_the_step_after_the_end_is_all_that_differs(run: str, i: int) -> None:
    # With the score s on the end token n and no value after it, the last TD error is
    #   s - beta * kl_n - V_n;
    # TRL has two: gamma * V_{n+1} - beta * kl_n - V_n, and s - V_{n+1} one position later. So
    #   A_n(TRL) - A_n = gamma * V_{n+1} + gamma * lambda * (s - V_{n+1}) - s,
    # which reaches an earlier token t by the factor (gamma * lambda)^(n - t).
    rollout, config = Rollout.read(run, i), RUNS[run]["config"]
    gamma, decay = config["gamma"], config["gamma"] * config["lam"]
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.mask, config["kl_coef"])
    advantages, returns = gae(rewards, rollout.values, rollout.mask, gamma, config["lam"])
    short = (~rollout.full).nonzero().flatten().tolist()
    assert short
    for row in short:
        end = int(rollout.mask[row].sum()) - 1
        score, after = float(rollout.scores[row]), float(rollout.values[row, end + 1])
        last = gamma * after + decay * (score - after) - score
        for t in range(end + 1):
            difference = decay ** (end - t) * last
            assert_equal(
                advantages[row, t], float(rollout.advantages_before_whitening[row, t]) - difference
            )
            assert_equal(returns[row, t], float(rollout.returns[row, t]) - difference)


# The losses


@each_step
def test_policy_loss_of_a_micro_batch_is_equal(run: str, i: int, j: int) -> None:
    step = Step.read(run, i, j)
    loss, stats = step.policy_loss(step.new_logprobs, step.policy_tokens)
    assert_equal(loss, step.recorded["pg_loss"])
    clipped = stats.clip_fraction / step.policy_tokens
    assert_equal(clipped, step.recorded["pg_clipfrac"], FLOAT32)


@each_step
def test_approx_kl_is_equal_over_all_positions(run: str, i: int, j: int) -> None:
    step = Step.read(run, i, j)
    _, stats = step.policy_loss(step.new_logprobs, step.policy_tokens)
    # Convention 3: TRL divides by the padding too.
    assert_equal(stats.approx_kl / step.rows.mask.numel(), step.recorded["approxkl"])


@each_step
def test_value_loss_of_a_micro_batch_is_equal_with_the_longer_mask(
    run: str, i: int, j: int
) -> None:
    step = Step.read(run, i, j)
    loss, stats = step.value_loss(step.vpred, step.value_tokens)
    assert_equal(loss, step.recorded["vf_loss"])
    clipped = stats.clip_fraction / step.value_tokens
    assert_equal(clipped, step.recorded["vf_clipfrac"], FLOAT32)


@each_step
def test_gradients_are_equal(run: str, i: int, j: int) -> None:
    step, config = Step.read(run, i, j), RUNS[run]["config"]
    # Convention 2: each micro-batch weighs the same, whatever the tokens in it.
    micro_batches = config["gradient_accumulation_steps"]
    new_logprobs = step.new_logprobs.requires_grad_()
    vpred = step.vpred.requires_grad_()
    pg_loss, _ = step.policy_loss(new_logprobs, micro_batches * step.policy_tokens)
    vf_loss, _ = step.value_loss(vpred, micro_batches * step.value_tokens)
    (pg_loss + config["vf_coef"] * vf_loss).backward()
    assert new_logprobs.grad is not None
    assert vpred.grad is not None
    assert_equal(new_logprobs.grad, step.recorded["new_logprobs_grad"])
    assert_equal(vpred.grad, step.recorded["vpred_grad"])


@pytest.mark.parametrize("i", range(2))
@pytest.mark.parametrize("epoch", range(2))
def test_micro_batches_weigh_by_their_tokens_here_and_the_same_in_trl(i: int, epoch: int) -> None:
    steps = [Step.read("k3-accumulated", i, 2 * epoch + micro) for micro in range(2)]
    tokens = [step.policy_tokens for step in steps]
    recorded = [step.recorded["pg_loss"] for step in steps]
    loss = sum(step.policy_loss(step.new_logprobs, sum(tokens))[0] for step in steps)
    weighted = sum(n * each for n, each in zip(tokens, recorded, strict=True)) / sum(tokens)
    assert tokens[0] != tokens[1]
    assert_equal(torch.as_tensor(loss), weighted)
    assert weighted != pytest.approx(sum(recorded) / 2, abs=1e-4)
