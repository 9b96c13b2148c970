"""PPO: metrics against naive loops, micro-batches, seeds, what is trained and what is not."""

import copy
import math
from collections.abc import Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.params.schema import RLParams
from plumbline.rollout.experience import Experience, Sequences
from plumbline.rollout.generate import Responses
from plumbline.training import rl
from plumbline.training.reporting import ignore_metrics, ignore_progress
from plumbline.training.rl import (
    Models,
    Tokens,
    make_experience,
    make_kl_controller,
    query_batches,
    train_rl,
    update,
)

PAD, EOS = 0, 1
QUERIES = [[7, 9, 250], [8], [44, 6, 5, 30, 61, 12], [99, 3], [20, 21], [15], [33, 34, 35], [70, 2]]
ANSWERS = [
    [12, 40, EOS],
    [200],
    [17, EOS],
    [5, 77, 140, 63, 29, 31],
    [EOS],
    [81, 82, 83, EOS],
    [90, 91, 92, 93, 94, EOS],
    [60, EOS],
]
TOKENS = Tokens(eos=EOS, pad=PAD)

METRICS = {
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "policy/grad_norm",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "val/explained_var",
    "lr",
    "episode",
    "response/length_mean",
    "response/clipped_fraction",
    "perf/episodes_per_s",
    "perf/tokens_per_s",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
}


def rl_params(**changes: Any) -> RLParams:
    defaults: dict[str, Any] = {
        "episodes": 16,
        "rollout_batch_size": 8,
        "mini_batch_size": 8,
        "micro_batch_size": 8,
        "epochs": 1,
        "response_tokens": 6,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
    }
    return RLParams(**{**defaults, **changes})


@pytest.fixture
def models(lm: PreTrainedModel, scorer: PreTrainedModel) -> Models:
    return Models(lm, copy.deepcopy(lm), scorer, copy.deepcopy(scorer))


def moved(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """The model with small random changes to its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def run(models: Models, params: RLParams, seed: int = 0) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []

    def log(step: int, metrics: Mapping[str, float]) -> None:
        assert step == metrics["episode"]
        history.append(dict(metrics))

    train_rl(models, QUERIES, params, tokens=TOKENS, seed=seed, log=log, progress=ignore_progress)
    return history


def rollout() -> tuple[Sequences, Responses]:
    width = max(map(len, ANSWERS))
    responses = Responses(
        torch.tensor([[*answer, *[PAD] * (width - len(answer))] for answer in ANSWERS]),
        torch.tensor([[t < len(answer) for t in range(width)] for answer in ANSWERS]),
        torch.tensor([answer[-1] == EOS for answer in ANSWERS]),
    )
    return Sequences.join(QUERIES, responses, PAD), responses


def experience_of(
    models: Models, params: RLParams, kl_coef: float = 0.1
) -> tuple[Experience, dict[str, float]]:
    return make_experience(models, *rollout(), params, kl_coef)


def sgd(models: Models, learning_rate: float = 1.0) -> torch.optim.Optimizer:
    trained = [*models.policy.parameters(), *models.critic.parameters()]
    return torch.optim.SGD(trained, lr=learning_rate)


def one_update(
    models: Models, experience: Experience, params: RLParams, learning_rate: float = 1.0
) -> dict[str, float]:
    optimizer = sgd(models, learning_rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return update(
        models, experience, params, optimizer, scheduler, torch.Generator().manual_seed(0)
    )


# The naive oracle: every sequence alone, unpadded, in Python floats.


def naive_tokens(model: PreTrainedModel) -> tuple[list[list[float]], list[list[float]]]:
    """Log-prob and entropy of each token of each answer."""
    logprobs, entropies = [], []
    for query, answer in zip(QUERIES, ANSWERS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*query, *answer]])).logits[0].double()
        logp = torch.log_softmax(logits, -1)[len(query) - 1 :]
        logprobs.append([float(logp[t, token]) for t, token in enumerate(answer)])
        entropies.append([float(-(row.exp() * row).sum()) for row in logp[: len(answer)]])
    return logprobs, entropies


def naive_readings(model: PreTrainedModel) -> list[list[float]]:
    """The scalar model's number before each token of each answer, and after the last."""
    readings = []
    for query, answer in zip(QUERIES, ANSWERS, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([[*query, *answer]]))
            numbers = hidden.last_hidden_state[0] @ model.score.weight[0]
        readings.append(numbers[len(query) - 1 :].tolist())
    return readings


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def real(column: Tensor) -> list[list[float]]:
    return [column[row, : len(answer)].tolist() for row, answer in enumerate(ANSWERS)]


def test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token(models: Models) -> None:
    moved(models.policy)
    params = rl_params(micro_batch_size=4, missing_eos_score=-3.0)
    experience, _ = experience_of(models, params, kl_coef=0.1)
    logprobs, ref_logprobs = (naive_tokens(m)[0] for m in (models.policy, models.ref_policy))
    scores = [row[-1] for row in naive_readings(models.reward_model)]
    for row, answer in enumerate(ANSWERS):
        expected = [-0.1 * (p - q) for p, q in zip(logprobs[row], ref_logprobs[row], strict=True)]
        expected[-1] += scores[row] if answer[-1] == EOS else -3.0
        assert experience.rewards[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        assert not experience.rewards[row, len(answer) :].any()


def test_an_unended_response_loses_the_penalty_where_asked(models: Models) -> None:
    params = rl_params(missing_eos="subtract", missing_eos_score=2.0)
    experience, _ = experience_of(models, params)
    scores = [row[-1] for row in naive_readings(models.reward_model)]
    # Policy and reference are the same, so the last reward is the score alone.
    assert float(experience.rewards[1, 0]) == pytest.approx(scores[1] - 2, abs=1e-4)
    assert float(experience.rewards[0, 2]) == pytest.approx(scores[0], abs=1e-4)


def test_advantages_and_returns_by_a_naive_loop(models: Models) -> None:
    moved(models.policy)
    moved(models.critic)
    params = rl_params(whiten_advantages=False, gamma=0.9, gae_lambda=0.8)
    experience, metrics = experience_of(models, params)
    values = [row[:-1] for row in naive_readings(models.critic)]
    rewards = real(experience.rewards)
    all_returns = []
    for row, answer in enumerate(ANSWERS):
        advantage, following, advantages = 0.0, 0.0, []
        for t in reversed(range(len(answer))):
            delta = rewards[row][t] + 0.9 * following - values[row][t]
            advantage = delta + 0.9 * 0.8 * advantage
            following = values[row][t]
            advantages.insert(0, advantage)
        returns = [a + v for a, v in zip(advantages, values[row], strict=True)]
        all_returns.append(returns)
        count = len(answer)
        assert experience.values[row, :count].tolist() == pytest.approx(values[row], abs=1e-4)
        assert experience.advantages[row, :count].tolist() == pytest.approx(advantages, abs=1e-4)
        assert experience.returns[row, :count].tolist() == pytest.approx(returns, abs=1e-4)
    errors = [r - v for r, v in zip(flat(all_returns), flat(values), strict=True)]
    explained = 1 - variance(errors) / variance(flat(all_returns))
    assert metrics["val/explained_var"] == pytest.approx(explained, abs=1e-4)
    assert metrics["val/returns_mean"] == pytest.approx(mean(flat(all_returns)), abs=1e-4)
    assert metrics["val/values_mean"] == pytest.approx(mean(flat(values)), abs=1e-4)


def test_advantages_are_whitened_over_the_real_tokens(models: Models) -> None:
    whitened = flat(real(experience_of(models, rl_params())[0].advantages))
    raw = flat(real(experience_of(models, rl_params(whiten_advantages=False))[0].advantages))
    std = math.sqrt(variance(raw))
    assert whitened == pytest.approx([(value - mean(raw)) / std for value in raw], abs=1e-4)


def test_whitened_rewards_keep_their_mean(models: Models) -> None:
    moved(models.policy)
    whitened = flat(real(experience_of(models, rl_params(whiten_rewards=True))[0].rewards))
    raw = flat(real(experience_of(models, rl_params())[0].rewards))
    std = math.sqrt(variance(raw))
    expected = [(value - mean(raw)) / std + mean(raw) for value in raw]
    assert whitened == pytest.approx(expected, abs=1e-4)


def test_the_objectives_means_are_over_real_tokens(models: Models) -> None:
    moved(models.policy)
    _, metrics = experience_of(models, rl_params(micro_batch_size=2), kl_coef=0.1)
    logprobs, ref_logprobs = (naive_tokens(m)[0] for m in (models.policy, models.ref_policy))
    kl = mean([sum(p) - sum(q) for p, q in zip(logprobs, ref_logprobs, strict=True)])
    readings = naive_readings(models.reward_model)
    scores = [
        row[-1] if answer[-1] == EOS else -1.0
        for row, answer in zip(readings, ANSWERS, strict=True)
    ]
    expected = {
        "objective/kl": kl,
        "objective/kl_coef": 0.1,
        "objective/entropy": mean([-sum(row) for row in logprobs]),
        "objective/scores": mean(scores),
        "objective/scores_std": math.sqrt(variance(scores) * (len(scores) - 1) / len(scores)),
        "objective/non_score_reward": -0.1 * kl,
        "objective/rlhf_reward": mean(scores) - 0.1 * kl,
        "response/length_mean": 25 / 8,
        "response/clipped_fraction": 2 / 8,
        "val/num_eos_tokens": 6,
    }
    assert abs(kl) > 1e-3
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_the_updates_means_are_over_real_tokens(models: Models, micro_batch_size: int) -> None:
    params = rl_params(micro_batch_size=micro_batch_size)
    experience, _ = experience_of(models, params)
    moved(models.policy)
    moved(models.critic)
    logprobs, entropies = naive_tokens(models.policy)
    values = [row[:-1] for row in naive_readings(models.critic)]
    stats = one_update(models, experience, params, learning_rate=0.0)

    columns = zip(
        flat(logprobs), flat(real(experience.logprobs)), flat(real(experience.advantages)),
        flat(values), flat(real(experience.values)), flat(real(experience.returns)),
        strict=True,
    )  # fmt: skip
    ratios, kls, policy_losses, clipped, value_losses, values_clipped = ([] for _ in range(6))
    for logp, old, advantage, value, old_value, target in columns:
        ratio = math.exp(logp - old)
        plain, bounded = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)
        near = min(max(value, old_value - 0.2), old_value + 0.2)
        ratios.append(ratio)
        kls.append((logp - old) ** 2 / 2)
        policy_losses.append(max(plain, bounded))
        clipped.append(float(bounded > plain))
        value_losses.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        values_clipped.append(float((near - target) ** 2 > (value - target) ** 2))
    expected = {
        "val/ratio": mean(ratios),
        "policy/approxkl_avg": mean(kls),
        "loss/policy_avg": mean(policy_losses),
        "policy/clipfrac_avg": mean(clipped),
        "loss/value_avg": mean(value_losses),
        "val/clipfrac_avg": mean(values_clipped),
        "policy/entropy_avg": mean(flat(entropies)),
        "val/ratio_var": 0.0,
    }
    assert 0 < expected["policy/clipfrac_avg"] < 1
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_before_the_first_update_nothing_has_moved(models: Models) -> None:
    first = run(models, rl_params(episodes=8))[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)
    assert first["policy/clipfrac_avg"] == first["val/clipfrac_avg"] == 0
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6)


def test_micro_batches_leave_the_step_the_same(models: Models) -> None:
    experience, _ = experience_of(models, rl_params())
    # Away from the rollout's weights, so that both losses and their clips have a gradient.
    moved(models.policy)
    moved(models.critic)
    before = [weights(m) for m in (models.policy, models.critic)]
    results = {}
    for size in (8, 4, 2, 1):
        trained = copy.deepcopy(models)
        params = rl_params(micro_batch_size=size, max_grad_norm=1e9)
        stats = one_update(trained, experience, params, learning_rate=0.05)
        results[size] = ([weights(m) for m in (trained.policy, trained.critic)], stats)
    for old, new in zip(before, results[8][0], strict=True):
        assert float((new - old).abs().max()) > 1e-3
    for size in (4, 2, 1):
        for ours, whole in zip(results[size][0], results[8][0], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=0)
        assert results[size][1] == pytest.approx(results[8][1], abs=1e-4, rel=1e-4)


def test_each_row_is_updated_on_once_an_epoch(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def step(_models: Models, _experience: Experience, rows: Tensor, *_: Any) -> dict[str, float]:
        seen.append(rows.tolist())
        return {"val/ratio": float(len(seen))}

    params = rl_params(mini_batch_size=4, micro_batch_size=2, epochs=3)
    experience, _ = experience_of(models, params)
    monkeypatch.setattr(rl, "_optimizer_step", step)
    scheduler = MagicMock()
    stats = update(
        models, experience, params, MagicMock(), scheduler, torch.Generator().manual_seed(0)
    )
    assert scheduler.step.call_count == 6
    assert [len(rows) for rows in seen] == [4] * 6
    for epoch in range(3):
        assert sorted(seen[2 * epoch] + seen[2 * epoch + 1]) == list(range(8))
    assert seen[0] != seen[2]
    assert stats == {"val/ratio": 3.5, "val/ratio_var": 3.5}


def test_gradients_are_clipped_to_the_norm_asked_for(models: Models) -> None:
    experience, _ = experience_of(models, rl_params())
    before = [weights(m) for m in (models.policy, models.critic)]
    stats = one_update(models, experience, rl_params(max_grad_norm=0.01))
    assert min(stats["policy/grad_norm"], stats["val/grad_norm"]) > 0.01
    for old, model in zip(before, (models.policy, models.critic), strict=True):
        assert float((weights(model) - old).norm()) == pytest.approx(0.01, rel=1e-3)


def test_only_policy_and_critic_are_trained(models: Models) -> None:
    before = Models(*(weights(model) for model in models))  # type: ignore[arg-type]
    run(models, rl_params(epochs=2))
    after = Models(*(weights(model) for model in models))  # type: ignore[arg-type]
    assert torch.equal(after.ref_policy, before.ref_policy)
    assert torch.equal(after.reward_model, before.reward_model)
    assert not torch.equal(after.policy, before.policy)
    assert not torch.equal(after.critic, before.critic)
    for model in (models.ref_policy, models.reward_model):
        assert all(weight.grad is None for weight in model.parameters())


def test_the_seed_decides_every_bit(models: Models) -> None:
    params = rl_params(episodes=16, mini_batch_size=4, micro_batch_size=4)
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        trained = copy.deepcopy(models)
        run(trained, params, seed)
        runs.append([weights(m) for m in (trained.policy, trained.critic)])
    first, again, other = runs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_rollout_logs_the_names_people_know(models: Models) -> None:
    done: list[tuple[int, int]] = []
    history: list[dict[str, float]] = []
    train_rl(
        models, QUERIES, rl_params(episodes=24), tokens=TOKENS, seed=0,
        log=lambda _, metrics: history.append(dict(metrics)),
        progress=lambda *state: done.append(state),
    )  # fmt: skip
    assert done == [(8, 24), (16, 24), (24, 24)]
    assert [row["episode"] for row in history] == [8, 16, 24]
    for row in history:
        assert set(row) >= METRICS
        assert all(math.isfinite(value) for value in row.values())
        assert row["perf/tokens_per_s"] > row["perf/episodes_per_s"] > 0
        assert row["objective/entropy"] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_during_the_warm_up(models: Models, schedule: str) -> None:
    params = rl_params(episodes=32, schedule=schedule, warmup_fraction=0.5)
    rates = [row["lr"] for row in run(models, params)]
    assert rates[:3] == pytest.approx([0, 0.5e-3, 1e-3])


def test_the_learning_rate_decays_in_a_line_to_0_after_the_last_update(models: Models) -> None:
    rates = [row["lr"] for row in run(models, rl_params(schedule="linear"))]
    assert rates == pytest.approx([1e-3, 0.5e-3])


def test_the_adaptive_controller_moves_the_coefficient(models: Models) -> None:
    params = rl_params(
        kl_controller="adaptive", kl_coef=0.1, kl_target=5.0, kl_horizon=100, episodes=16
    )
    # KL is 0 on the first rollout: the error is clipped at -0.2.
    coefs = [row["objective/kl_coef"] for row in run(models, params)]
    assert coefs == pytest.approx([0.1, 0.1 * (1 - 0.2 * 8 / 100)])


def test_a_fixed_controller_stays() -> None:
    controller = make_kl_controller(rl_params(kl_coef=0.3))
    controller.update(100.0, 8)
    assert controller.value == 0.3


@pytest.mark.parametrize("broken", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_stops_with_advice(models: Models, broken: str) -> None:
    experience, _ = experience_of(models, rl_params())
    column = getattr(experience, broken).clone()
    column[0, 0] = math.nan
    before = weights(models.policy)
    with pytest.raises(TrainingError, match=r"lower rl\.learning_rate or raise rl\.kl_coef"):
        one_update(models, experience._replace(**{broken: column}), rl_params())
    assert torch.equal(weights(models.policy), before)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (3, 8)])
def test_each_pass_uses_every_query_once(count: int, size: int) -> None:
    queries = [[index] for index in range(count)]
    batches = query_batches(queries, size, torch.Generator().manual_seed(0))
    drawn = list(islice((query[0] for batch in batches for query in batch), 5 * count))
    passes = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_batches_of_queries_have_the_size_asked_for() -> None:
    batches = query_batches([[0], [1], [2]], 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in islice(batches, 3)] == [8, 8, 8]


class CountingModel(nn.Module):
    """A scalar model whose score is how often `target` stands in the sequence."""

    base_model_prefix = "backbone"

    def __init__(self, target: int) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.score = nn.Linear(300, 1, bias=False)
        with torch.no_grad():
            self.score.weight.zero_()[0, target] = 1.0

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        counted = nn.functional.one_hot(input_ids, 300) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(last_hidden_state=counted.cumsum(1).float())


def test_a_rewarded_token_becomes_likelier(models: Models) -> None:
    target = 123
    queries = [[7, 9], [8], [20, 30, 40], [55]]

    def share() -> float:
        with torch.no_grad():
            logits = [models.policy(input_ids=torch.tensor([q])).logits[0, -1] for q in queries]
        return float(torch.stack(logits).softmax(-1)[:, target].mean())

    before = share()
    params = rl_params(
        episodes=1600, rollout_batch_size=80, mini_batch_size=40, micro_batch_size=40, epochs=2,
        response_tokens=4, kl_coef=0.0, learning_rate=3e-3,
        missing_eos="subtract", missing_eos_score=0.0,
    )  # fmt: skip
    history: list[float] = []
    train_rl(
        models._replace(reward_model=CountingModel(target)),  # type: ignore[arg-type]
        queries, params, tokens=TOKENS, seed=0,
        log=lambda _, metrics: history.append(metrics["objective/scores"]),
        progress=ignore_progress,
    )  # fmt: skip
    assert before < 0.05
    assert share() > 10 * before
    assert history[-1] > history[0] + 0.5


def test_nobody_has_to_listen(models: Models) -> None:
    train_rl(
        models, QUERIES, rl_params(episodes=8), tokens=TOKENS, seed=0, log=ignore_metrics,
        progress=ignore_progress,
    )  # fmt: skip
