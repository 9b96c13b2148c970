"""The update by hand and against naive loops: every term of the loss, its metrics, its steps."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.rollout.experience import (
    Experience,
    Sequences,
    response_states,
    response_values,
)
from plumbline.training import policy_update
from plumbline.training.models import Models, ValueHead
from plumbline.training.policy_update import Optimizer, Setting, trunk_values, update

MakeSetting = Callable[..., Setting]
Move = Callable[..., Any]
Flatten = Callable[[nn.Module], Tensor]
# The fixture `answered` holds an object of a class that pytest keeps to itself.
Answered = Any

KL_COEF = 0.3


def sgd(models: Models, learning_rate: float) -> Optimizer:
    """Without momentum and at a rate of 1, a step is the gradient."""
    weights = [weight for _, group in models.trained for weight in group]
    optimizer = torch.optim.SGD(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # Without gradients it does nothing; a schedule that starts before its optimizer warns.
    optimizer.step()
    return Optimizer(optimizer, schedule)  # type: ignore[arg-type]


def one_update(
    models: Models, experience: Experience, setting: Setting, learning_rate: float = 1.0,
    kl_coef: float = KL_COEF, optimizer: Any = None,
) -> dict[str, float]:  # fmt: skip
    return update(
        models, experience, setting, optimizer or sgd(models, learning_rate),
        torch.Generator().manual_seed(0), kl_coef,
    )  # fmt: skip


def modules(models: Models) -> list[nn.Module]:
    """What is trained."""
    return [module for module in (models.policy, models.critic) if module is not None]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def experience_of(
    models: Models, answered: Answered, temperature: float = 1.0, noise: float = 0.15
) -> Experience:
    """Rollout columns of the answers: what the models say, about `noise` off; made up advantages.

    On the padding stands what must not count.
    """
    sequences: Sequences = answered.sequences
    mask = sequences.response_mask
    generator = torch.Generator().manual_seed(2)

    def off(rows: list[list[float]] | None, size: float) -> Tensor:
        column = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * size
        for row, values in enumerate(rows or []):
            column[row, : len(values)] += torch.tensor(values, dtype=torch.float64)
        return column.masked_fill(~mask, 1e3)

    logprobs, _ = answered.tokens(models.policy, temperature)
    values = value_rows(models, answered)
    old_values = None if values is None else off(values, noise)
    return Experience(
        sequences, off(logprobs, noise), off(logprobs, 3 * noise), off(None, 1.0), old_values,
        None if old_values is None else old_values + off(None, 0.5),
    )  # fmt: skip


def value_rows(models: Models, answered: Answered) -> list[list[float]] | None:
    critic = models.critic
    if critic is None:
        return None
    if isinstance(critic, ValueHead):
        return [row.tolist() for row in naive_values(models, answered)]
    return [row[:-1] for row in answered.readings(critic)]


def naive_values(models: Models, answered: Answered) -> list[Tensor]:
    """The critic's value before each token of each answer; with a gradient."""
    head = models.critic
    trunk = models.policy if isinstance(head, ValueHead) else head
    assert head is not None
    assert trunk is not None
    rows = []
    for query, answer in zip(answered.queries, answered.answers, strict=True):
        ids = torch.tensor([[*query, *answer]])
        hidden = trunk.base_model(input_ids=ids).last_hidden_state[0][len(query) - 1 : -1]
        layer = head.linear if isinstance(head, ValueHead) else head.score
        bias = 0.0 if layer.bias is None else layer.bias
        rows.append(hidden @ layer.weight[0] + bias)
    return rows


def naive_loss(
    models: Models, experience: Experience, answered: Answered, setting: Setting, kl_coef: float
) -> Tensor:
    """The whole loss, token by token, each sequence alone; with a gradient."""
    params, temperature = setting.params, setting.sampling.temperature
    high = params.cliprange if params.cliprange_high is None else params.cliprange_high
    terms = []
    values = naive_values(models, answered) if models.critic is not None else None
    logits = answered.logits(models.policy)
    for row, answer in enumerate(answered.answers):
        logp = torch.log_softmax(logits[row] / temperature, -1)
        for t, token in enumerate(answer):
            ratio = (logp[t, token] - experience.logprobs[row, t]).exp()
            advantage = experience.advantages[row, t]
            bounded = ratio.clamp(1 - params.cliprange, 1 + high)
            loss = torch.maximum(-advantage * ratio, -advantage * bounded)
            if values is not None and experience.values is not None:
                assert experience.returns is not None
                value, old = values[row][t], experience.values[row, t]
                target, near = experience.returns[row, t], params.cliprange_value
                clipped = torch.minimum(torch.maximum(value, old - near), old + near)
                worse = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
                loss = loss + params.value_coef * 0.5 * worse
            if params.kl_in == "loss":
                k1 = logp[t, token] - experience.ref_logprobs[row, t]
                k2, k3 = k1**2 / 2, torch.exp(-k1) - 1 + k1
                loss = loss + kl_coef * {"k2": k2, "k3": k3}[params.kl_estimator]
            entropy = -(logp[t].exp() * logp[t]).sum()
            terms.append(loss - params.entropy_coef * entropy)
    return torch.stack(terms).mean()


def double(models: Models) -> Models:
    return Models(*(None if model is None else model.double() for model in models))  # type: ignore[arg-type]


def with_critic(models: Models, critic: str) -> Models:
    if critic == "none":
        return models._replace(critic=None)
    return models if critic == "reward_model" else models._replace(critic=ValueHead(32, seed=3))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("reward_model", {"value_coef": 0.7, "cliprange_value": 0.1}),
    ("shared", {"critic": "shared", "value_coef": 0.7, "cliprange_value": 0.1}),
    ("none", {"algorithm": "reinforce", "cliprange_high": 0.4}),
    ("none", {"algorithm": "rloo", "kl_in": "loss", "kl_estimator": "k2"}),
    ("none", {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3", "temperature": 0.7}),
    ("none", {"algorithm": "reinforce", "entropy_coef": 0.2, "temperature": 1.3}),
    (
        "shared",
        {
            "critic": "shared", "kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1,
            "cliprange_high": 0.3, "temperature": 0.8, "cliprange_value": 0.1,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("micro_batch_tokens", [4096, 14])
@pytest.mark.parametrize(("critic", "changes"), CASES)
def test_the_gradient_is_that_of_the_whole_loss(
    models: Models, answered: Answered, make_setting: MakeSetting, critic: str,
    changes: dict[str, Any], micro_batch_tokens: int,
) -> None:  # fmt: skip
    trained = double(with_critic(models, critic))
    setting = make_setting(max_grad_norm=1e9, micro_batch_tokens=micro_batch_tokens, **changes)
    experience = experience_of(trained, answered, setting.sampling.temperature)
    weights = [weight for module in modules(trained) for weight in module.parameters()]
    loss = naive_loss(trained, experience, answered, setting, KL_COEF)
    expected = torch.autograd.grad(loss, weights, materialize_grads=True)
    before = [weight.detach().clone() for weight in weights]
    one_update(trained, experience, setting)
    # The values of a critic are cut to float32 on their way.
    tolerance = 1e-11 if critic == "none" else 2e-6
    for old, new, gradient in zip(before, weights, expected, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient, atol=tolerance, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in expected) > 0.1


@pytest.mark.parametrize(("critic", "changes"), CASES)
def test_all_that_counts_is_trained(
    models: Models, answered: Answered, make_setting: MakeSetting, critic: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    trained = with_critic(models, critic)
    before = {id(w): w.detach().clone() for m in modules(trained) for w in m.parameters()}
    experience = experience_of(trained, answered, changes.get("temperature", 1.0))
    one_update(trained, experience, make_setting(max_grad_norm=1e9, **changes))
    for module in modules(trained):
        assert not any(torch.equal(before[id(w)], w) for w in module.parameters())


def float_columns(experience: Experience) -> Experience:
    return Experience(
        experience.sequences,
        *(None if column is None else column.float() for column in experience[1:]),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("micro_batch_tokens", [4096, 14])
@pytest.mark.parametrize("critic", ["reward_model", "shared"])
def test_the_metrics_are_means_over_real_tokens(
    models: Models, answered: Answered, make_setting: MakeSetting, critic: str,
    micro_batch_tokens: int,
) -> None:  # fmt: skip
    trained = with_critic(models, critic)
    setting = make_setting(
        micro_batch_tokens=micro_batch_tokens, critic=critic, kl_in="loss", kl_estimator="k3",
        entropy_coef=0.1, cliprange_high=0.3, temperature=0.8,
    )  # fmt: skip
    experience = float_columns(experience_of(trained, answered, 0.8, noise=0.3))
    logprobs, entropies = answered.tokens(trained.policy, 0.8)
    values = value_rows(trained, answered)
    assert values is not None
    assert experience.values is not None
    assert experience.returns is not None
    stats = one_update(trained, experience, setting, learning_rate=0.0)

    real = answered.real
    columns = zip(
        flat(logprobs), flat(real(experience.logprobs)), flat(real(experience.ref_logprobs)),
        flat(real(experience.advantages)), flat(values), flat(real(experience.values)),
        flat(real(experience.returns)),
        strict=True,
    )  # fmt: skip
    ratios, kls, policy_losses, clipped, value_losses, values_clipped, k3 = ([] for _ in range(7))
    for logp, old, ref, advantage, value, old_value, target in columns:
        ratio = math.exp(logp - old)
        plain, bounded = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3)
        near = min(max(value, old_value - 0.2), old_value + 0.2)
        ratios.append(ratio)
        kls.append((logp - old) ** 2 / 2)
        policy_losses.append(max(plain, bounded))
        clipped.append(float(bounded > plain))
        value_losses.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        values_clipped.append(float((near - target) ** 2 > (value - target) ** 2))
        k3.append(math.exp(ref - logp) - 1 + logp - ref)
    expected = {
        "val/ratio": mean(ratios),
        "policy/approxkl_avg": mean(kls),
        "loss/policy_avg": mean(policy_losses),
        "policy/clipfrac_avg": mean(clipped),
        "policy/ratio_max": max(ratios),
        "loss/value_avg": mean(value_losses),
        "val/clipfrac_avg": mean(values_clipped),
        "policy/entropy_avg": mean(flat(entropies)),
        "loss/kl_avg": mean(k3),
        "val/ratio_var": 0.0,
        "policy/epochs": 1.0,
    }
    assert 0 < expected["policy/clipfrac_avg"] < 1
    assert 0 < expected["val/clipfrac_avg"] < 1
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    norms = {"policy/grad_norm"} if critic == "shared" else {"policy/grad_norm", "val/grad_norm"}
    assert set(stats) == set(expected) | norms


def test_without_a_critic_there_are_no_metrics_of_one(
    models: Models, answered: Answered, make_setting: MakeSetting
) -> None:
    trained = models._replace(critic=None)
    setting = make_setting(algorithm="reinforce")
    stats = one_update(trained, float_columns(experience_of(trained, answered)), setting)
    assert set(stats) == {
        "loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
        "policy/epochs", "policy/grad_norm", "policy/ratio_max", "val/ratio", "val/ratio_var",
    }  # fmt: skip


# By hand


class Table(nn.Module):
    """Says the same whatever it is given: its logits are weights times a hidden state of 1."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(probabilities), bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(probabilities).double().log().unsqueeze(1))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = torch.ones(*input_ids.shape, 1, dtype=torch.float64)
        return SimpleNamespace(logits=self.head(hidden))


def test_the_whole_loss_by_hand(make_setting: MakeSetting) -> None:
    # One response of one token, drawn with 1/2, now 3/4; the reference says 3/8; advantage 2.
    # Policy: ratio 1.5, so -2 * min(1.5, 1.2) = -2.4, clipped: no gradient.
    # KL k3: exp(-k1) = 1/2, k1 = log 2: log 2 - 1/2; its derivative by log p is 1 - 1/2.
    # Entropy: H = log 4 - 3/4 log 3. Value: 1 against a return of 3, old value 0.9: (1 - 3)^2 / 2.
    policy = Table([0.75, 0.25])
    head = ValueHead(1, seed=0).double()
    with torch.no_grad():
        head.linear.weight.fill_(0.4)
        head.linear.bias.fill_(0.6)
    models = Models(policy, None, policy, head)  # type: ignore[arg-type]
    yes = torch.tensor([[True]])
    one = torch.ones(1, 1, dtype=torch.float64)
    sequences = Sequences(torch.tensor([[1, 0]]), torch.tensor([[True, True]]), yes)
    experience = Experience(
        sequences, math.log(0.5) * one, math.log(0.375) * one, 2 * one, 0.9 * one, 3 * one
    )
    setting = make_setting(
        episodes=1, rollout_batch_size=1, mini_batch_size=1, critic="shared",
        kl_in="loss", kl_estimator="k3", entropy_coef=0.25, value_coef=0.125, max_grad_norm=1e9,
    )  # fmt: skip
    old = policy.head.weight.detach().clone()
    stats = one_update(models, experience, setting, kl_coef=0.5)
    entropy = math.log(4) - 0.75 * math.log(3)
    expected = {
        "loss/policy_avg": -2.4,
        "loss/kl_avg": math.log(2) - 0.5,
        "loss/value_avg": 2.0,
        "policy/entropy_avg": entropy,
        "policy/clipfrac_avg": 1,
        "val/clipfrac_avg": 0,
        "policy/approxkl_avg": math.log(1.5) ** 2 / 2,
        "policy/ratio_max": 1.5,
        "val/ratio": 1.5,
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-6), name
    # d log p_0 / d z = (1/4, -1/4); dH / dz_j = -p_j (log p_j + H).
    logits = []
    for index, p in enumerate((0.75, 0.25)):
        by_kl = 0.5 * 0.5 * (0.25 if index == 0 else -0.25)
        by_entropy = 0.25 * p * (math.log(p) + entropy)
        logits.append(by_kl + by_entropy)
    moved = (old - policy.head.weight.detach()).flatten().tolist()
    assert moved == pytest.approx(logits, rel=1e-9)
    # d L / dV = 1/8 * (1 - 3), for the weight (hidden state 1) and the bias.
    assert head.linear.weight.item() == pytest.approx(0.4 + 0.25, rel=1e-6)
    assert head.linear.bias.item() == pytest.approx(0.6 + 0.25, rel=1e-6)
    norm = math.sqrt(sum(g**2 for g in logits) + 2 * 0.25**2)
    assert stats["policy/grad_norm"] == pytest.approx(norm, rel=1e-6)


# What must not matter


def test_gradients_of_the_step_before_are_left_out(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten
) -> None:
    experience = float_columns(experience_of(models, answered))
    other = copy.deepcopy(models)
    for trained, left in ((models, None), (other, 1e3)):
        optimizer = sgd(trained, 0.05)
        for module in modules(trained):
            for weight in module.parameters():
                weight.grad = None if left is None else torch.full_like(weight, left)
        one_update(trained, experience, make_setting(), optimizer=optimizer)
    for ours, theirs in zip(modules(models), modules(other), strict=True):
        assert torch.equal(weights(ours), weights(theirs))


def test_micro_batches_leave_the_step_the_same(
    models: Models, answered: Answered, make_setting: MakeSetting, moved: Move, weights: Flatten
) -> None:
    changes = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1}
    experience = float_columns(experience_of(models, answered))
    # Away from the rollout's weights, so that both losses and their clips have a gradient.
    for module in modules(models):
        moved(module)
    before = [weights(module) for module in modules(models)]
    results = {}
    for size in (4096, 24, 14, 1):
        trained = copy.deepcopy(models)
        setting = make_setting(micro_batch_tokens=size, max_grad_norm=1e9, **changes)
        stats = one_update(trained, experience, setting, learning_rate=0.05)
        results[size] = ([weights(module) for module in modules(trained)], stats)
    for old, new in zip(before, results[4096][0], strict=True):
        assert float((new - old).abs().max()) > 1e-3
    for size in (24, 14, 1):
        for ours, whole in zip(results[size][0], results[4096][0], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-6, rtol=0)
        assert results[size][1] == pytest.approx(results[4096][1], abs=1e-4, rel=1e-4)


def test_the_order_and_the_padding_of_a_rollout_do_not_matter(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten
) -> None:
    setting = make_setting(max_grad_norm=1e9)
    experience = float_columns(experience_of(models, answered))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    ids, mask, response_mask = experience.sequences

    def wide(column: Tensor, value: float = 50.0) -> Tensor:
        return nn.functional.pad(column[order], (0, 3), value=value)

    sequences = Sequences(
        nn.functional.pad(ids[order], (2, 3), value=77),
        nn.functional.pad(mask[order], (2, 3)),
        wide(response_mask, False),
    )
    columns = (wide(column) for column in experience[1:] if isinstance(column, Tensor))
    other = copy.deepcopy(models)
    stats = one_update(models, experience, setting, learning_rate=0.05)
    other_stats = one_update(other, Experience(sequences, *columns), setting, learning_rate=0.05)
    for ours, theirs in zip(modules(models), modules(other), strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-6, rtol=0)
    assert other_stats == pytest.approx(stats, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_what_stands_on_the_padding_has_no_effect(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten, garbage: float
) -> None:
    setting = make_setting(kl_in="loss", kl_estimator="k3", entropy_coef=0.1)
    clean = float_columns(experience_of(models, answered))
    mask = clean.sequences.response_mask
    columns = (c.masked_fill(~mask, garbage) for c in clean[1:] if isinstance(c, Tensor))
    other = copy.deepcopy(models)
    stats = one_update(models, clean, setting, learning_rate=0.05)
    planted = Experience(clean.sequences, *columns)
    assert one_update(other, planted, setting, learning_rate=0.05) == stats
    for ours, theirs in zip(modules(models), modules(other), strict=True):
        assert torch.equal(weights(ours), weights(theirs))


# Steps


def test_each_row_is_updated_on_once_an_epoch(
    models: Models, answered: Answered, make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def accumulate(_: Models, __: Experience, rows: Tensor, *___: Any) -> dict[str, float]:
        seen.append(rows.tolist())
        number = float(len(seen))
        return {"val/ratio": number, "policy/ratio_max": 7 - number, "policy/approxkl_avg": 0.5}

    setting = make_setting(mini_batch_size=4, epochs=3)
    experience = experience_of(models, answered)
    monkeypatch.setattr(policy_update, "_accumulate", accumulate)
    steps: list[str] = []
    optimizer = SimpleNamespace(
        adam=SimpleNamespace(step=lambda: steps.append("step")),
        schedule=SimpleNamespace(step=lambda: steps.append("rate")),
    )
    stats = one_update(models, experience, setting, optimizer=optimizer)
    assert steps == ["step", "rate"] * 6
    assert [len(rows) for rows in seen] == [4] * 6
    for epoch in range(3):
        assert sorted(seen[2 * epoch] + seen[2 * epoch + 1]) == list(range(8))
    assert seen[0] != seen[2]
    # The means of 1 to 6, their variance, and the largest of 6 to 1.
    assert stats == {
        "val/ratio": 3.5, "val/ratio_var": 3.5, "policy/ratio_max": 6, "policy/epochs": 3,
        "policy/approxkl_avg": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("passed_at", "target", "taken"),
    # 2 mini-batches an epoch, 3 epochs; KL 1 at the one that passes, else 0.1.
    [(1, 0.5, 0), (2, 0.5, 1), (4, 0.5, 3), (6, 0.5, 5), (7, 0.5, 6), (4, None, 6), (4, 1.0, 6)],
)
def test_target_kl_ends_the_epochs_before_the_step_is_taken(
    models: Models, answered: Answered, make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch,
    passed_at: int, target: float | None, taken: int,
) -> None:  # fmt: skip
    seen = []

    def accumulate(*_: Any) -> dict[str, float]:
        seen.append(len(seen) + 1)
        kl = 1.0 if seen[-1] == passed_at else 0.1
        return {"val/ratio": 1.0, "policy/ratio_max": 1.0, "policy/approxkl_avg": kl}

    monkeypatch.setattr(policy_update, "_accumulate", accumulate)
    steps: list[str] = []
    optimizer = SimpleNamespace(
        adam=SimpleNamespace(step=lambda: steps.append("step")),
        schedule=SimpleNamespace(step=lambda: steps.append("rate")),
    )
    setting = make_setting(mini_batch_size=4, epochs=3, target_kl=target)
    stats = one_update(models, experience_of(models, answered), setting, optimizer=optimizer)
    assert steps.count("step") == taken
    # The schedule goes on as if all steps had been taken.
    assert steps.count("rate") == 6
    assert stats["policy/epochs"] == taken / 2
    seen_kl = [0.1] * taken + ([1.0] if taken < 6 else [])
    if target == 0.5:
        assert stats["policy/approxkl_avg"] == pytest.approx(mean(seen_kl))


def test_target_kl_keeps_the_weights_that_passed_it(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten
) -> None:
    # The old log-probs are 0.3 off, so that the first mini-batch's KL passes at once.
    setting = make_setting(mini_batch_size=4, epochs=4, target_kl=0.01)
    before = [weights(module) for module in modules(models)]
    experience = float_columns(experience_of(models, answered, noise=0.3))
    stats = one_update(models, experience, setting)
    assert stats["policy/approxkl_avg"] > 0.01
    assert stats["policy/epochs"] == 0
    for old, module in zip(before, modules(models), strict=True):
        assert torch.equal(old, weights(module))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_is_0_at_the_end_whatever_target_kl_left_out(
    models: Models, answered: Answered, make_setting: MakeSetting, schedule: str
) -> None:
    setting = make_setting(mini_batch_size=4, epochs=3, schedule=schedule, target_kl=1e-9)
    optimizer = Optimizer.of(models, setting.params)
    start = optimizer.schedule.get_last_lr()[0]
    logprobs, _ = answered.tokens(models.policy)
    experience = float_columns(experience_of(models, answered))
    for row, values in enumerate(logprobs):
        experience.logprobs[row, : len(values)] = torch.tensor(values)
    # 16 episodes: two rollouts. The first step of each is taken, the others pass the target.
    assert one_update(models, experience, setting, optimizer=optimizer)["policy/epochs"] <= 0.5
    halfway = optimizer.schedule.get_last_lr()[0]
    one_update(models, experience, setting, optimizer=optimizer)
    assert start == 1e-3
    assert halfway == pytest.approx(0.5e-3)
    assert optimizer.schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_adam_is_set_up_from_the_params(models: Models, make_setting: MakeSetting) -> None:
    params = make_setting(weight_decay=0.03, learning_rate=2e-4).params
    adam = Optimizer.of(models, params).adam
    assert adam.defaults["eps"] == 1e-5
    assert adam.defaults["weight_decay"] == 0.03
    assert adam.param_groups[0]["initial_lr"] == 2e-4
    held = [id(weight) for group in adam.param_groups for weight in group["params"]]
    wanted = [id(weight) for module in modules(models) for weight in module.parameters()]
    assert sorted(held) == sorted(wanted)


def test_gradients_are_clipped_to_the_norm_asked_for(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten
) -> None:
    experience = float_columns(experience_of(models, answered))
    before = [weights(module) for module in modules(models)]
    stats = one_update(models, experience, make_setting(max_grad_norm=0.01))
    assert min(stats["policy/grad_norm"], stats["val/grad_norm"]) > 0.01
    for old, module in zip(before, modules(models), strict=True):
        assert float((weights(module) - old).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_shared_trunk_is_clipped_with_its_head(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten
) -> None:
    shared = with_critic(models, "shared")
    experience = float_columns(experience_of(shared, answered))
    before = torch.cat([weights(module) for module in modules(shared)])
    stats = one_update(shared, experience, make_setting(max_grad_norm=0.01, critic="shared"))
    assert stats["policy/grad_norm"] > 0.01
    after = torch.cat([weights(module) for module in modules(shared)])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("broken", ["advantages", "returns", "ref_logprobs"])
def test_a_loss_that_is_not_finite_stops_with_advice(
    models: Models, answered: Answered, make_setting: MakeSetting, weights: Flatten, broken: str
) -> None:
    experience = float_columns(experience_of(models, answered))
    column = getattr(experience, broken).clone()
    column[0, 0] = math.nan
    before = [weights(module) for module in modules(models)]
    setting = make_setting(kl_in="loss", kl_estimator="k3")
    with pytest.raises(TrainingError, match=r"lower rl\.learning_rate or raise rl\.kl_coef"):
        one_update(models, experience._replace(**{broken: column}), setting)
    for old, module in zip(before, modules(models), strict=True):
        assert torch.equal(weights(module), old)


# The critic


def test_values_of_a_shared_trunk_are_read_off_its_hidden_states(
    models: Models, answered: Answered
) -> None:
    shared = with_critic(models, "shared")
    assert isinstance(shared.critic, ValueHead)
    with torch.no_grad():
        shared.critic.linear.bias.fill_(0.5)
        hidden = response_states(shared.policy, answered.sequences).hidden
        values = trunk_values(shared.critic, answered.sequences, hidden)
        expected = naive_values(shared, answered)
    assert values.dtype == torch.float32
    for row, mine in enumerate(expected):
        assert values[row, : len(mine)].tolist() == pytest.approx(mine.tolist(), abs=1e-4)


def test_values_of_a_scalar_model_are_its_own(models: Models, answered: Answered) -> None:
    critic = models.critic
    assert isinstance(critic, PreTrainedModel)
    with torch.no_grad():
        values = response_values(critic, answered.sequences)
    for row, mine in enumerate(answered.readings(critic)):
        assert values[row, : len(mine) - 1].tolist() == pytest.approx(mine[:-1], abs=1e-4)
