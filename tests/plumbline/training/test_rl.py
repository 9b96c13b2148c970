"""RL: metrics against naive loops, what is trained and what is not, seeds, and what is learned."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.tokenize import ChatEncoder
from plumbline.errors import ParamsError, TrainingError
from plumbline.rollout.experience import Experience
from plumbline.rollout.generate import Responses
from plumbline.rollout.scoring import Scores
from plumbline.training import rl
from plumbline.training.credit import Baseline
from plumbline.training.models import Models, ValueHead
from plumbline.training.policy_update import Setting
from plumbline.training.reporting import ignore_metrics, ignore_progress, ignore_warnings
from plumbline.training.rl import make_experience, train_rl
from plumbline.training.rl_state import PromptBatches, make_kl_controller

MakeSetting = Callable[..., Setting]
RunRL = Callable[..., list[dict[str, float]]]
Flatten = Callable[[nn.Module], Tensor]
Move = Callable[..., Any]
# The fixture `answered` holds an object of a class that pytest keeps to itself.
Answered = Any

SCORES = [0.5, -2.0, 1.5, 3.0, -0.25, 0.0, 1.0, -1.0]

OF_ALL = {
    "objective/kl",
    "objective/kl_k3",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "objective/scores_std",
    "objective/reward_model",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "policy/grad_norm",
    "policy/ratio_max",
    "policy/epochs",
    "loss/policy_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "val/decode_gap_max",
    "lr",
    "episode",
    "response/length_mean",
    "response/clipped_fraction",
    "perf/episodes_per_s",
    "perf/tokens_per_s",
    "perf/flops_per_s",
    "perf/mfu",
    "perf/update_mfu",
    "perf/padding_share",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
}
OF_CRITICS = {
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/explained_var",
    "val/values_mean",
    "val/returns_mean",
}
OF_THEIR_OWN = {"val/grad_norm"}
"""Of a critic with weights of its own."""

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_shared": {"critic": "shared"},
    "reinforce": {"algorithm": "reinforce"},
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def for_algorithm(models: Models, name: str) -> Models:
    """The models with the critic that an algorithm wants."""
    if name == "ppo":
        return models
    return models._replace(critic=ValueHead(32, seed=3) if name == "ppo_shared" else None)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a reward function: the share of small letters."""
    module = ModuleType("toy_rewards")
    module.letters = lambda _, text: sum(c.islower() for c in text) / 6  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_rewards", module)
    return module


def experience_of(
    models: Models, answered: Answered, setting: Setting, kl_coef: float = 0.1,
    responses: Responses | None = None,
) -> tuple[Experience, dict[str, float]]:  # fmt: skip
    scores = torch.tensor(SCORES)
    return make_experience(
        models, answered.sequences, responses or answered.responses,
        Scores(scores, {"reward_model": 2 * scores, "reward_toy": scores + 1}), setting, kl_coef,
        Baseline(setting.params),
    )  # fmt: skip


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: list[float]) -> float:
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def near(expected: Any) -> Any:
    return pytest.approx(expected, abs=1e-4)


# From a scored rollout to advantages

BARE: dict[str, Any] = {"algorithm": "reinforce", "baseline": "none", "whiten_advantages": False}
"""With a discount of 0 the advantages are the rewards themselves."""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_rewards_are_the_kl_penalty_and_the_score_at_the_last_token(
    models: Models, answered: Answered, make_setting: MakeSetting, moved: Move, estimator: str,
    temperature: float,
) -> None:  # fmt: skip
    moved(models.policy)
    setting = make_setting(
        **BARE, gamma=0.0, micro_batch_tokens=20, kl_estimator=estimator, temperature=temperature
    )
    experience, _ = experience_of(models._replace(critic=None), answered, setting, kl_coef=0.1)
    logprobs, _ = answered.tokens(models.policy, temperature)
    ref_logprobs, _ = answered.tokens(models.ref_policy, temperature)
    penalties = 0.0
    for row, answer in enumerate(answered.answers):
        k1 = [p - q for p, q in zip(logprobs[row], ref_logprobs[row], strict=True)]
        k2, k3 = [k**2 / 2 for k in k1], [math.exp(-k) - 1 + k for k in k1]
        expected = [-0.1 * k for k in {"k1": k1, "k2": k2, "k3": k3}[estimator]]
        penalties += sum(abs(k) for k in expected)
        expected[-1] += SCORES[row]
        assert experience.advantages[row, : len(answer)].tolist() == near(expected)
        assert not experience.advantages[row, len(answer) :].any()
        assert experience.logprobs[row, : len(answer)].tolist() == near(logprobs[row])
        assert experience.ref_logprobs[row, : len(answer)].tolist() == near(ref_logprobs[row])
    assert penalties > 0.01


def test_a_penalty_in_the_loss_is_not_in_the_rewards(
    models: Models, answered: Answered, make_setting: MakeSetting, moved: Move
) -> None:
    moved(models.policy)
    setting = make_setting(**BARE, gamma=0.0, kl_in="loss", kl_estimator="k3")
    experience, metrics = experience_of(models._replace(critic=None), answered, setting, 0.1)
    for row, answer in enumerate(answered.answers):
        expected = [0.0] * (len(answer) - 1) + [SCORES[row]]
        assert experience.advantages[row, : len(answer)].tolist() == expected
    # It costs the same, wherever it is taken from.
    assert metrics["objective/non_score_reward"] == near(-0.1 * metrics["objective/kl_k3"])


@pytest.mark.parametrize("micro_batch_tokens", [14, 4096])
def test_advantages_and_returns_by_a_naive_loop(
    models: Models, answered: Answered, make_setting: MakeSetting, moved: Move,
    micro_batch_tokens: int,
) -> None:  # fmt: skip
    moved(models.policy)
    moved(models.critic)
    setting = make_setting(
        whiten_advantages=False, gamma=0.9, gae_lambda=0.8, micro_batch_tokens=micro_batch_tokens
    )
    experience, metrics = experience_of(models, answered, setting, kl_coef=0.1)
    assert experience.values is not None
    assert experience.returns is not None
    logprobs, ref_logprobs = (answered.tokens(m)[0] for m in (models.policy, models.ref_policy))
    values = [row[:-1] for row in answered.readings(models.critic)]
    all_returns = []
    for row, answer in enumerate(answered.answers):
        rewards = [-0.1 * (p - q) for p, q in zip(logprobs[row], ref_logprobs[row], strict=True)]
        rewards[-1] += SCORES[row]
        advantage, following, advantages = 0.0, 0.0, []
        for t in reversed(range(len(answer))):
            delta = rewards[t] + 0.9 * following - values[row][t]
            advantage = delta + 0.9 * 0.8 * advantage
            following = values[row][t]
            advantages.insert(0, advantage)
        returns = [a + v for a, v in zip(advantages, values[row], strict=True)]
        all_returns.append(returns)
        count = len(answer)
        assert experience.values[row, :count].tolist() == near(values[row])
        assert experience.advantages[row, :count].tolist() == near(advantages)
        assert experience.returns[row, :count].tolist() == near(returns)
    errors = [r - v for r, v in zip(flat(all_returns), flat(values), strict=True)]
    explained = 1 - variance(errors) / variance(flat(all_returns))
    assert metrics["val/explained_var"] == near(explained)
    assert metrics["val/returns_mean"] == near(mean(flat(all_returns)))
    assert metrics["val/values_mean"] == near(mean(flat(values)))


def test_a_shared_critics_values_are_read_off_the_policys_trunk(
    models: Models, answered: Answered, make_setting: MakeSetting
) -> None:
    head = ValueHead(32, seed=3)
    with torch.no_grad():
        head.linear.bias.fill_(0.5)
    setting = make_setting(critic="shared", micro_batch_tokens=14)
    experience, metrics = experience_of(models._replace(critic=head), answered, setting)
    assert experience.values is not None
    expected = []
    for query, answer in zip(answered.queries, answered.answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*query, *answer]])
            hidden = models.policy.transformer(input_ids=ids).last_hidden_state[0]
            expected.append(head.linear(hidden[len(query) - 1 : -1]).squeeze(1).tolist())
    assert answered.real(experience.values) == [near(row) for row in expected]
    assert metrics["val/values_mean"] == near(mean(flat(expected)))


def test_advantages_are_whitened_over_the_real_tokens(
    models: Models, answered: Answered, make_setting: MakeSetting
) -> None:
    whitened, raw = (
        experience_of(models, answered, make_setting(whiten_advantages=whiten))[0]
        for whiten in (True, False)
    )
    values = flat(answered.real(raw.advantages))
    std = math.sqrt(variance(values))
    expected = [(value - mean(values)) / std for value in values]
    assert flat(answered.real(whitened.advantages)) == near(expected)
    # The critic learns the returns as they are.
    assert torch.equal(torch.as_tensor(whitened.returns), torch.as_tensor(raw.returns))


def test_without_a_critic_there_is_nothing_of_one(
    models: Models, answered: Answered, make_setting: MakeSetting
) -> None:
    for name in ("reinforce", "rloo", "grpo"):
        setting = make_setting(**ALGORITHMS[name])
        experience, metrics = experience_of(models._replace(critic=None), answered, setting)
        assert experience.values is experience.returns is None
        assert not set(metrics) & OF_CRITICS


def test_the_objectives_means_are_over_real_tokens(
    models: Models, answered: Answered, make_setting: MakeSetting, moved: Move
) -> None:
    moved(models.policy)
    _, metrics = experience_of(models, answered, make_setting(micro_batch_tokens=14), kl_coef=0.1)
    logprobs, ref_logprobs = (answered.tokens(m)[0] for m in (models.policy, models.ref_policy))
    pairs = list(zip(logprobs, ref_logprobs, strict=True))
    kl = mean([sum(p) - sum(q) for p, q in pairs])
    k3 = mean(
        [sum(math.exp(b - a) - 1 + a - b for a, b in zip(p, q, strict=True)) for p, q in pairs]
    )
    expected = {
        "objective/kl": kl,
        "objective/kl_k3": k3,
        "objective/kl_coef": 0.1,
        "objective/entropy": mean([-sum(row) for row in logprobs]),
        "objective/scores": mean(SCORES),
        "objective/scores_std": math.sqrt(variance(SCORES) * (len(SCORES) - 1) / len(SCORES)),
        "objective/reward_model": 2 * mean(SCORES),
        "objective/reward_toy": mean(SCORES) + 1,
        "objective/non_score_reward": -0.1 * kl,
        "objective/rlhf_reward": mean(SCORES) - 0.1 * kl,
        "response/length_mean": 25 / 8,
        "response/clipped_fraction": 2 / 8,
        "val/num_eos_tokens": 6,
    }
    assert abs(kl) > 1e-3
    assert k3 > 1e-3
    for name, value in expected.items():
        assert metrics[name] == near(value), name


def test_the_decoding_gap_is_the_largest_on_a_real_token(
    models: Models, answered: Answered, make_setting: MakeSetting
) -> None:
    logprobs, _ = answered.tokens(models.policy)
    drawn = torch.full(answered.responses.mask.shape, 99.0)
    for row, values in enumerate(logprobs):
        drawn[row, : len(values)] = torch.tensor(values) + 0.125
    drawn[3, 2] -= 0.625
    responses = answered.responses._replace(logprobs=drawn)
    _, metrics = experience_of(models, answered, make_setting(), responses=responses)
    assert metrics["val/decode_gap_max"] == near(0.5)


# Training


@each_algorithm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_update_nothing_has_moved(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, name: str, temperature: float
) -> None:
    setting = make_setting(**ALGORITHMS[name], episodes=8, temperature=temperature)
    first = run_rl(for_algorithm(models, name), setting)[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert first["policy/clipfrac_avg"] == first.get("val/clipfrac_avg", 0) == 0
    assert first["objective/kl"] == first["objective/kl_k3"] == 0
    assert first["val/decode_gap_max"] < 1e-4


@each_algorithm
def test_every_rollout_logs_the_names_people_know(
    models: Models, make_setting: MakeSetting, prompts: list[str], encoder: ChatEncoder, name: str
) -> None:
    done: list[tuple[int, int]] = []
    history: list[dict[str, float]] = []
    train_rl(
        for_algorithm(models, name), prompts, encoder,
        make_setting(**ALGORITHMS[name], episodes=24), seed=0,
        log=lambda _, metrics: history.append(dict(metrics)),
        progress=lambda *state: done.append(state), warn=ignore_warnings,
    )  # fmt: skip
    assert done == [(8, 24), (16, 24), (24, 24)]
    assert [row["episode"] for row in history] == [8, 16, 24]
    expected = OF_ALL | (OF_CRITICS if "ppo" in name else set())
    expected |= OF_THEIR_OWN if name == "ppo" else set()
    expected |= {"loss/kl_avg"} if name == "grpo" else set()
    for row in history:
        assert set(row) == expected
        assert all(math.isfinite(value) for value in row.values())
        assert row["perf/tokens_per_s"] > row["perf/episodes_per_s"] > 0
        assert row["objective/entropy"] > 0
        assert row["policy/epochs"] == 1


@each_algorithm
def test_only_policy_and_critic_are_trained(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, name: str
) -> None:
    models = for_algorithm(models, name)._replace(judge=copy.deepcopy(models.reward_model))
    before = {part: weights(model) for part, model in models._asdict().items() if model}
    run_rl(models, make_setting(**ALGORITHMS[name], epochs=2))
    after = {part: weights(model) for part, model in models._asdict().items() if model}
    changed = {part for part in before if not torch.equal(before[part], after[part])}
    assert changed == {"policy", "critic"} & set(before)
    for model in (models.ref_policy, models.reward_model, models.judge):
        assert model is not None
        assert all(weight.grad is None for weight in model.parameters())


@each_algorithm
def test_the_seed_decides_every_bit(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, name: str
) -> None:
    setting = make_setting(**ALGORITHMS[name], mini_batch_size=4)
    runs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        trained = for_algorithm(copy.deepcopy(models), name)
        run_rl(trained, setting, seed=seed)
        runs.append([weights(m) for m in (trained.policy, trained.critic) if m is not None])
    first, again, other = runs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_seed_decides_what_is_sampled(
    models: Models, make_setting: MakeSetting, prompts: list[str], encoder: ChatEncoder
) -> None:
    # One prompt alone: its order can't make the difference.
    drawn: list[float] = []
    for seed in (0, 0, 1):
        train_rl(
            copy.deepcopy(models), prompts[:1], encoder, make_setting(episodes=8), seed=seed,
            log=lambda _, metrics: drawn.append(metrics["objective/entropy"]),
            progress=ignore_progress, warn=ignore_warnings,
        )  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_during_the_warm_up(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, schedule: str
) -> None:
    setting = make_setting(episodes=32, schedule=schedule, warmup_fraction=0.5)
    rates = [row["lr"] for row in run_rl(models, setting)]
    assert rates[:3] == pytest.approx([0, 0.5e-3, 1e-3])


@pytest.mark.parametrize("target_kl", [None, 1e-12])
def test_the_learning_rate_decays_in_a_line_to_0_after_the_last_update(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, target_kl: float | None
) -> None:
    # 4 rollouts of 2 mini-batches in 2 epochs, of which target_kl leaves out some.
    setting = make_setting(
        schedule="linear", episodes=32, mini_batch_size=4, epochs=2,
        target_kl=target_kl,
    )  # fmt: skip
    history = run_rl(models, setting)
    assert [row["lr"] for row in history] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    epochs = [row["policy/epochs"] for row in history]
    assert epochs == [2] * 4 if target_kl is None else max(epochs) < 2


def test_the_adaptive_controller_moves_the_coefficient(
    models: Models, make_setting: MakeSetting, run_rl: RunRL
) -> None:
    setting = make_setting(
        kl_controller="adaptive", kl_coef=0.1, kl_target=5.0, kl_horizon=100, episodes=24,
        learning_rate=1e-9,
    )  # fmt: skip
    # KL stays about 0: the error is clipped at -0.2.
    coefs = [row["objective/kl_coef"] for row in run_rl(models, setting)]
    step = 1 - 0.2 * 8 / 100
    assert coefs == pytest.approx([0.1, 0.1 * step, 0.1 * step**2])


def test_the_coefficient_weighs_the_penalty_in_the_loss(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten
) -> None:
    # On the second rollout the policy has left the reference, and the penalties differ.
    trained = []
    for kl_coef in (0.0, 5.0):
        copied = copy.deepcopy(models)._replace(critic=None)
        run_rl(copied, make_setting(**ALGORITHMS["grpo"], kl_coef=kl_coef))
        trained.append(weights(copied.policy))
    assert not torch.equal(*trained)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_rewards_and_losses_take_the_coefficient_of_the_moment(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, monkeypatch: pytest.MonkeyPatch,
    kl_in: str,
) -> None:  # fmt: skip
    taken: dict[str, list[float]] = {"make_experience": [], "update": []}
    for name, place in (("make_experience", 5), ("update", 5)):
        original = getattr(rl, name)

        def spy(*inputs: Any, name: str = name, place: int = place, call: Any = original) -> Any:
            taken[name].append(inputs[place])
            return call(*inputs)

        monkeypatch.setattr(rl, name, spy)
    setting = make_setting(
        kl_controller="adaptive", kl_coef=0.1, kl_target=5.0, kl_horizon=100, episodes=24,
        kl_in=kl_in, kl_estimator="k3",
    )  # fmt: skip
    logged = [row["objective/kl_coef"] for row in run_rl(models, setting)]
    assert len(set(logged)) == 3
    assert taken == {"make_experience": logged, "update": logged}


def test_a_fixed_controller_stays(make_setting: MakeSetting) -> None:
    controller = make_kl_controller(make_setting(kl_coef=0.3).params)
    controller.update(100.0, 8)
    assert controller.value == 0.3


# Prompts


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (3, 8)])
def test_each_pass_uses_every_prompt_once(make_setting: MakeSetting, count: int, size: int) -> None:
    params = make_setting(episodes=size, rollout_batch_size=size, mini_batch_size=size).params
    batches = PromptBatches(count, params, torch.Generator().manual_seed(0))
    drawn = list(islice((index for batch in batches for index in batch), 5 * count))
    passes = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert {len(batch) for batch in islice(batches, 3)} == {size}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("copies", [2, 4])
def test_responses_to_a_prompt_stand_side_by_side(
    make_setting: MakeSetting, algorithm: str, copies: int
) -> None:
    params = make_setting(algorithm=algorithm, responses_per_prompt=copies).params
    batches = PromptBatches(5, params, torch.Generator().manual_seed(0))
    drawn = []
    for batch in islice(batches, 5 * copies):
        assert len(batch) == 8
        groups = [batch[start : start + copies] for start in range(0, 8, copies)]
        assert all(len(set(group)) == 1 for group in groups)
        drawn += [group[0] for group in groups]
    passes = [drawn[start : start + 5] for start in range(0, len(drawn), 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_rollouts_cover_all_prompts(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, prompts: list[str],
    toy: ModuleType, name: str,
) -> None:  # fmt: skip
    seen: list[str] = []

    def remember(prompt: str, _: str) -> float:
        seen.append(prompt)
        return 0.0

    toy.letters = remember
    changes = ALGORITHMS[name] | ({"responses_per_prompt": 4} if name == "rloo" else {})
    copies = 4 if name == "rloo" else 1
    # As many rollouts as a pass over the eight prompts takes.
    setting = make_setting(**changes, episodes=8 * copies, rewards={"toy_rewards:letters": 0.0})
    run_rl(models._replace(critic=None), setting)
    assert sorted(seen) == sorted(prompts * copies)
    groups = [seen[start : start + copies] for start in range(0, len(seen), copies)]
    assert all(len(set(group)) == 1 for group in groups)


def test_each_response_is_scored_with_its_own_prompt_and_text(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, encoder: ChatEncoder,
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[str, str]] = []
    toy.letters = lambda prompt, text: float(seen.append((prompt, text)) or 0)
    batches: list[tuple[list[list[int]], Responses]] = []
    sample = rl.sample_responses

    def spy(model: PreTrainedModel, queries: list[list[int]], **options: Any) -> Responses:
        batches.append((queries, sample(model, queries, **options)))
        return batches[-1][1]

    monkeypatch.setattr(rl, "sample_responses", spy)
    run_rl(models, make_setting(episodes=8, rewards={"toy_rewards:letters": 0.0}))
    ((queries, responses),) = batches
    prompts, texts = zip(*seen, strict=True)
    assert encoder.prompts(prompts) == queries
    assert len({json.loads(prompt)[0]["content"] for prompt in prompts}) == 8
    assert list(texts) == encoder.decode(responses.lists())


def test_any_stop_token_ends_a_response(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, encoder: ChatEncoder
) -> None:
    # All tokens but the one that opens an answer.
    opening = encoder.prompts(['[{"role": "user", "content": "a"}]'])[0][-1]
    every = SimpleNamespace(
        prompts=encoder.prompts, pad_token_id=encoder.pad_token_id, decode=encoder.decode,
        stop_token_ids=tuple(index for index in range(300) if index != opening),
    )  # fmt: skip
    first = run_rl(models, make_setting(episodes=8), encoder=every)[0]
    assert first["response/length_mean"] < 1.5
    assert first["response/clipped_fraction"] == 0
    assert first["val/num_eos_tokens"] == 8


# Rewards


def test_a_reward_function_of_weight_0_draws_its_curve_and_changes_no_bit(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, toy: ModuleType
) -> None:
    trained = []
    for rewards in ({}, {"toy_rewards:letters": 0.0}):
        copied = copy.deepcopy(models)
        history = run_rl(copied, make_setting(rewards=rewards))
        trained.append(weights(copied.policy))
        assert all(("objective/reward_letters" in row) == bool(rewards) for row in history)
    assert torch.equal(*trained)
    assert 0 < history[0]["objective/reward_letters"] < 1


def test_a_judge_draws_its_curve_and_changes_no_bit(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, moved: Move
) -> None:
    judge = moved(copy.deepcopy(models.reward_model), size=0.5)
    trained = []
    for present in (None, judge):
        copied = copy.deepcopy(models)._replace(judge=present)
        history = run_rl(copied, make_setting())
        trained.append(weights(copied.policy))
        assert all(("objective/judge" in row) == bool(present) for row in history)
    assert torch.equal(*trained)
    assert history[0]["objective/judge"] != near(history[0]["objective/reward_model"])


@pytest.mark.parametrize(
    ("treatment", "constant", "score"), [("replace", -3.0, -3.0), ("subtract", 2.0, -2.0)]
)
def test_a_missing_end_costs_what_the_params_say(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, toy: ModuleType, treatment: str,
    constant: float, score: float,
) -> None:  # fmt: skip
    toy.letters = lambda *_: 0.0
    setting = make_setting(
        response_tokens=16, temperature=3.0, reward_model_weight=0.0, missing_eos=treatment,
        missing_eos_score=constant, rewards={"toy_rewards:letters": 1.0},
        episodes=128, rollout_batch_size=128, mini_batch_size=128,
    )  # fmt: skip
    (metrics,) = run_rl(models, setting)
    assert 0 < metrics["response/clipped_fraction"] < 1
    assert metrics["objective/scores"] == near(score * metrics["response/clipped_fraction"])


def test_a_reward_that_is_no_number_stops_before_anything_is_learned(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, toy: ModuleType
) -> None:
    toy.letters = lambda *_: math.nan
    before = weights(models.policy)
    with pytest.raises(TrainingError, match=r"from toy_rewards:letters, got nan"):
        run_rl(models, make_setting(rewards={"toy_rewards:letters": 0.0}))
    assert torch.equal(weights(models.policy), before)


def test_a_reward_function_that_is_missing_is_found_before_sampling(
    models: Models, make_setting: MakeSetting, run_rl: RunRL
) -> None:
    with pytest.raises(ParamsError, match=r"^rl\.rewards: "):
        run_rl(models, make_setting(rewards={"no_such_module_here:f": 1.0}), encoder=None)


# Less memory


@pytest.mark.parametrize("name", ["ppo", "ppo_shared", "grpo"])
def test_gradient_checkpointing_changes_no_gradient(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, weights: Flatten, name: str
) -> None:
    results = []
    for checkpointing in (False, True):
        trained = for_algorithm(copy.deepcopy(models), name)
        networks = [m for m in (trained.policy, trained.critic) if isinstance(m, PreTrainedModel)]
        forwards: list[int] = []
        widths: list[int] = []
        for model in networks:
            # Recomputing stops at the last tensor that is needed, which comes after this layer.
            layer = model.transformer.h[0].ln_1
            layer.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        embedding = trained.policy.get_input_embeddings()
        embedding.register_forward_pre_hook(
            lambda _, inputs, seen=widths: seen.append(inputs[0].shape[1])
        )
        setting = make_setting(
            **ALGORITHMS[name], gradient_checkpointing=checkpointing, response_tokens=4
        )
        run_rl(trained, setting)
        for model in networks:
            assert not model.training
            assert not any(module.training for module in model.modules())
            assert not model.is_gradient_checkpointing
        # transformers' own hooks would add up over the rollouts.
        assert len(embedding._forward_hooks) == 0
        results.append((weights(trained.policy), len(forwards), widths.count(1)))
    plain, checkpointed = results
    torch.testing.assert_close(plain[0], checkpointed[0], atol=1e-6, rtol=0)
    # Each update runs each network once more.
    assert checkpointed[1] == plain[1] + 2 * len(networks)
    # Sampling goes on token by token, from its cache.
    assert checkpointed[2] == plain[2] == 2 * 3


# Learning


@each_algorithm
def test_what_is_rewarded_becomes_likelier(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, toy: ModuleType, name: str
) -> None:
    changes = ALGORITHMS[name] | ({"value_coef": 0.5} if "ppo" in name else {})
    setting = make_setting(
        **changes, episodes=640, rollout_batch_size=64, mini_batch_size=32,
        epochs=2, kl_coef=0.0, learning_rate=3e-3,
        reward_model_weight=0.0, rewards={"toy_rewards:letters": 1.0},
    )  # fmt: skip
    history = run_rl(for_algorithm(models, name), setting)
    curve = [row["objective/reward_letters"] for row in history]
    assert [row["objective/scores"] for row in history] == near(curve)
    assert mean(curve[-2:]) > 2 * curve[0]


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


def test_a_token_that_the_reward_model_likes_becomes_likelier(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, prompts: list[str],
    encoder: ChatEncoder,
) -> None:  # fmt: skip
    queries = encoder.prompts(prompts)

    def shares() -> Tensor:
        with torch.no_grad():
            logits = [models.policy(input_ids=torch.tensor([q])).logits[0, -1] for q in queries]
        return torch.stack(logits).softmax(-1).mean(0)

    # Rare, but not so rare that it may never be seen.
    target = int((shares() - 0.005).abs().argmin())
    models = models._replace(reward_model=CountingModel(target))  # type: ignore[arg-type]

    def share() -> float:
        return float(shares()[target])

    before = share()
    setting = make_setting(
        episodes=1200, rollout_batch_size=80, mini_batch_size=40, epochs=2,
        response_tokens=4, kl_coef=0.0, learning_rate=3e-3,
    )  # fmt: skip
    scores = [row["objective/scores"] for row in run_rl(models, setting)]
    assert before < 0.05
    assert share() > 10 * before
    assert scores[-1] > scores[0] + 0.5


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_penalty_holds_the_policy_near_the_reference(
    models: Models, make_setting: MakeSetting, run_rl: RunRL, toy: ModuleType, kl_in: str
) -> None:
    kls = []
    for kl_coef in (0.0, 0.5):
        trained = copy.deepcopy(models)._replace(critic=None)
        setting = make_setting(
            algorithm="rloo", kl_in=kl_in, kl_estimator="k3", kl_coef=kl_coef, episodes=320,
            rollout_batch_size=32, mini_batch_size=32, epochs=2,
            learning_rate=3e-3,
            reward_model_weight=0.0, rewards={"toy_rewards:letters": 1.0},
        )  # fmt: skip
        kls.append(run_rl(trained, setting)[-1]["objective/kl"])
    free, held = kls
    assert held < 0.6 * free


# Listeners


def test_a_known_failure_is_said_once_with_its_step(
    models: Models, make_setting: MakeSetting, prompts: list[str], encoder: ChatEncoder
) -> None:
    # Two tokens are too few for nearly any answer: all are clipped.
    warned: list[tuple[int, str, str]] = []
    train_rl(
        models, prompts, encoder, make_setting(episodes=56, response_tokens=2), seed=0,
        log=ignore_metrics, progress=ignore_progress, warn=lambda *said: warned.append(said),
    )  # fmt: skip
    ((step, name, message),) = warned
    assert (step, name) == (40, "all_clipped")
    assert "sampling.response_tokens" in message


def test_nobody_has_to_listen(
    models: Models, make_setting: MakeSetting, prompts: list[str], encoder: ChatEncoder
) -> None:
    train_rl(
        models, prompts, encoder, make_setting(episodes=8), seed=0, log=ignore_metrics,
        progress=ignore_progress, warn=ignore_warnings,
    )  # fmt: skip


def test_the_loop_needs_no_library_of_data_sets() -> None:
    # They would take 80 MB of memory.
    code = "import sys, plumbline.training.rl; print({'datasets', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "set()", done.stderr
