"""DPO: log-probabilities of whole responses, its start, its curves, and what it learns."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.params.schema import DPOParams, LoraParams
from plumbline.training.dpo import (
    PairLogprobs,
    held_out_metrics,
    pair_batch,
    pair_logprobs,
    train_dpo,
)
from plumbline.training.lora import adapter_off, add_adapter
from plumbline.training.precision import Precision, autocast
from plumbline.training.reporting import ignore_progress

PAD, EOS = 0, 1
# 14 pairs of different lengths: with batches of 8 the last one is short. The chosen responses hold
# token 200, the rejected ones 201.
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [3, *range(10 + row, 12 + row + row % 4), EOS, 4],
        "chosen": [*range(40 + row, 41 + row + (row * 5) % 9), 200, EOS],
        "rejected": [*range(60 + row, 61 + row + (row * 7) % 5), 201, EOS],
    }
    for row in range(14)
]
CURVES = {
    f"dpo/{name}"
    for name in (
        "loss", "grad_norm", "lr", "epoch", "accuracy", "margin", "chosen_reward",
        "rejected_reward",
    )
}  # fmt: skip


def dpo_params(**changes: Any) -> DPOParams:
    defaults: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 5e-4,
        "schedule": "constant",
        "warmup_fraction": 0.0,
    }
    return DPOParams(**{**defaults, **changes})


def train(
    policy: PreTrainedModel,
    params: DPOParams,
    reference: PairLogprobs | None = None,
    rows: list[dict[str, Any]] = ROWS,
    seed: int = 0,
    pad: int = PAD,
    precision: Precision = "fp32",
) -> list[Mapping[str, float]]:
    history: list[Mapping[str, float]] = []
    train_dpo(
        policy, rows, reference or pair_logprobs(policy, rows, 4, pad), params, pad_token_id=pad,
        seed=seed, precision=precision, log=lambda _, metrics: history.append(metrics),
        progress=ignore_progress,
    )  # fmt: skip
    return history


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def naive_logprob(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    """Of one response alone: no batch, no padding, all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return math.fsum(float(logp[t, token]) for t, token in zip(places, response, strict=True))


def naive_margins(policy: PreTrainedModel, reference: PreTrainedModel, beta: float) -> list[float]:
    margins = []
    for row in ROWS:
        chosen, rejected = (
            naive_logprob(policy, row["prompt"], row[side])
            - naive_logprob(reference, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        margins.append(beta * (chosen - rejected))
    return margins


def other_policy(lm: PreTrainedModel) -> PreTrainedModel:
    """A policy that has left the reference, so that no margin is 0."""
    policy = copy.deepcopy(lm)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.mark.parametrize("max_tokens", [1, 100, 4096])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_log_probabilities_are_those_of_each_response_alone(
    lm: PreTrainedModel, max_tokens: int, pad: int
) -> None:
    logprobs = pair_logprobs(lm, ROWS, max_tokens, pad)
    for side in ("chosen", "rejected"):
        expected = [naive_logprob(lm, row["prompt"], row[side]) for row in ROWS]
        assert getattr(logprobs, side).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_order_of_the_pairs_does_not_matter(lm: PreTrainedModel) -> None:
    straight = pair_logprobs(lm, ROWS, 4, PAD)
    turned = pair_logprobs(lm, ROWS[::-1], 4, PAD)
    for one, other in zip(straight, turned, strict=True):
        torch.testing.assert_close(one, other.flip(0), atol=1e-4, rtol=0)


def test_a_batch_marks_the_tokens_of_the_responses() -> None:
    rows = [
        {"prompt": [7, 8], "chosen": [5, EOS], "rejected": [EOS]},
        {"prompt": [9], "chosen": [PAD, 6, 6, EOS], "rejected": [5, EOS]},
    ]
    batch = pair_batch(rows, PAD)
    assert batch["ids"].tolist() == [
        [7, 8, 5, EOS, PAD],
        [7, 8, EOS, PAD, PAD],
        [9, PAD, 6, 6, EOS],
        [9, 5, EOS, PAD, PAD],
    ]
    assert batch["response_mask"].int().tolist() == [
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0],
    ]
    assert batch["mask"].sum(1).tolist() == [4, 3, 5, 3]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_before_training_the_loss_is_log_two_and_the_margins_are_0(
    lm: PreTrainedModel, label_smoothing: float
) -> None:
    params = dpo_params(
        epochs=10, batch_size=14, micro_batch_tokens=200, learning_rate=1e-12,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    reference = pair_logprobs(lm, ROWS, 5, PAD)
    held_out = held_out_metrics(lm, ROWS, reference, params, PAD)
    assert held_out["dpo/held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert held_out["dpo/held_out_margin"] == pytest.approx(0, abs=1e-5)
    (logged,) = train(lm, params, reference)
    assert {name for name in logged if name.startswith("dpo/")} == CURVES
    assert logged["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("margin", "chosen_reward", "rejected_reward"):
        assert logged[f"dpo/{name}"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_curves_are_means_over_the_pairs_and_the_reference_is_the_one_given(
    lm: PreTrainedModel, label_smoothing: float
) -> None:
    policy, beta = other_policy(lm), 0.3
    margins = naive_margins(policy, lm, beta)
    terms = []
    for margin in margins:
        right = 1 / (1 + math.exp(-margin))
        terms.append(
            -(1 - label_smoothing) * math.log(right) - label_smoothing * math.log(1 - right)
        )
    rewards = {
        side: beta
        * math.fsum(
            naive_logprob(policy, row["prompt"], row[side])
            - naive_logprob(lm, row["prompt"], row[side])
            for row in ROWS
        )
        / len(ROWS)
        for side in ("chosen", "rejected")
    }
    assert len({margin > 0 for margin in margins}) == 2
    # Ten steps on all pairs at a rate that moves nothing; 8 pairs and then 6 a forward pass.
    params = dpo_params(
        epochs=10, batch_size=16, micro_batch_tokens=200, learning_rate=1e-12, beta=beta,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    (logged,) = train(policy, params, pair_logprobs(lm, ROWS, 3, PAD))
    assert logged["dpo/loss"] == pytest.approx(math.fsum(terms) / 14, rel=1e-4)
    assert logged["dpo/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 14, rel=1e-5)
    assert logged["dpo/margin"] == pytest.approx(math.fsum(margins) / 14, rel=1e-3)
    assert logged["dpo/chosen_reward"] == pytest.approx(rewards["chosen"], rel=1e-3)
    assert logged["dpo/rejected_reward"] == pytest.approx(rewards["rejected"], rel=1e-3)


def test_each_log_has_the_pairs_since_the_last_one(lm: PreTrainedModel) -> None:
    # 20 steps, so two logs: a mean over all pairs so far would lag behind.
    history = train(lm, dpo_params(epochs=20, batch_size=14, micro_batch_tokens=200))
    assert len(history) == 2
    assert history[0]["dpo/accuracy"] < history[1]["dpo/accuracy"] == 1
    for metrics in history:
        difference = metrics["dpo/chosen_reward"] - metrics["dpo/rejected_reward"]
        assert metrics["dpo/margin"] == pytest.approx(difference, rel=1e-4)


def test_the_policy_learns_what_is_preferred(lm: PreTrainedModel) -> None:
    reference = pair_logprobs(lm, ROWS, 4, PAD)
    params = dpo_params(epochs=10)
    train(lm, params, reference)
    metrics = held_out_metrics(lm, ROWS, reference, params, PAD)
    assert metrics["dpo/held_out_accuracy"] == 1
    assert metrics["dpo/held_out_margin"] > 0
    assert metrics["dpo/held_out_loss"] < 0.6
    assert not lm.training


def test_held_out_metrics_leave_wrong_labels_out_but_for_the_loss(lm: PreTrainedModel) -> None:
    policy = other_policy(lm)
    reference = pair_logprobs(lm, ROWS, 5, PAD)
    rows = [{**row, "clean": place % 3 > 0} for place, row in enumerate(ROWS)]
    params = dpo_params(beta=0.3, micro_batch_tokens=100, label_smoothing=0.1)
    metrics = held_out_metrics(policy, rows, reference, params, PAD)
    margins = naive_margins(policy, lm, 0.3)
    clean = [margin for place, margin in enumerate(margins) if place % 3 > 0]
    terms = [0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins]
    right = sum(margin > 0 for margin in clean) / len(clean)
    assert metrics["dpo/held_out_loss"] == pytest.approx(math.fsum(terms) / 14, rel=1e-4)
    assert metrics["dpo/held_out_accuracy"] == right
    assert metrics["dpo/held_out_accuracy_low"] < right < metrics["dpo/held_out_accuracy_high"]
    assert metrics["dpo/held_out_margin"] == pytest.approx(math.fsum(clean) / 9, rel=1e-3)


def test_without_a_clean_pair_only_the_loss_is_measured(lm: PreTrainedModel) -> None:
    rows = [{**row, "clean": False} for row in ROWS]
    reference = pair_logprobs(lm, rows, 5, PAD)
    metrics = held_out_metrics(lm, rows, reference, dpo_params(), PAD)
    assert set(metrics) == {"dpo/held_out_loss"}


def test_micro_batches_leave_the_training_the_same(lm: PreTrainedModel) -> None:
    trained = {}
    for size in (4096, 100, 1):
        model = copy.deepcopy(lm)
        train(model, dpo_params(micro_batch_tokens=size))
        trained[size] = weights(model)
    assert float((trained[4096] - weights(lm)).abs().max()) > 5e-4
    for size in (100, 1):
        torch.testing.assert_close(trained[size], trained[4096], atol=1e-6, rtol=0)


def test_recomputed_activations_leave_the_training_the_same(lm: PreTrainedModel) -> None:
    other = copy.deepcopy(lm)
    train(lm, dpo_params())
    train(other, dpo_params(gradient_checkpointing=True))
    torch.testing.assert_close(weights(lm), weights(other), atol=1e-6, rtol=0)


def test_the_pad_token_does_not_matter(lm: PreTrainedModel) -> None:
    other = copy.deepcopy(lm)
    train(lm, dpo_params())
    train(other, dpo_params(), pad=EOS)
    torch.testing.assert_close(weights(lm), weights(other), atol=1e-6, rtol=0)


def test_the_seed_decides_every_bit(lm: PreTrainedModel) -> None:
    trained = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(lm)
        train(model, dpo_params(), seed=seed)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_with_an_adapter_the_reference_stays_inside_the_policy(lm: PreTrainedModel) -> None:
    add_adapter(lm, LoraParams(enabled=True, rank=4), seed=0)
    with adapter_off(lm):
        reference = pair_logprobs(lm, ROWS, 5, PAD)
    (first, *_) = train(lm, dpo_params(epochs=10, learning_rate=5e-3), reference)
    assert first["dpo/margin"] > 0
    with adapter_off(lm):
        again = pair_logprobs(lm, ROWS, 5, PAD)
    for one, other in zip(reference, again, strict=True):
        assert torch.equal(one, other)
    metrics = held_out_metrics(lm, ROWS, reference, dpo_params(), PAD)
    assert metrics["dpo/held_out_accuracy"] > 0.9


def test_bf16_trains_the_same_thing_less_exactly(lm: PreTrainedModel) -> None:
    other = copy.deepcopy(lm)
    reference = pair_logprobs(lm, ROWS, 5, PAD)
    wide = train(lm, dpo_params(epochs=5), reference)
    with autocast(other.device, "bf16"):
        reference = pair_logprobs(other, ROWS, 5, PAD)
    narrow = train(other, dpo_params(epochs=5), reference, precision="bf16")
    assert other.dtype == torch.float32
    assert narrow[0]["dpo/loss"] == pytest.approx(wide[0]["dpo/loss"], rel=0.1)
    assert narrow[0]["dpo/loss"] != wide[0]["dpo/loss"]


def test_log_probabilities_of_other_rows_are_refused(lm: PreTrainedModel) -> None:
    reference = pair_logprobs(lm, ROWS[:5], 5, PAD)
    with pytest.raises(ValueError, match="expected reference log-probabilities of 14 pairs, got 5"):
        train(lm, dpo_params(), reference)


def test_a_loss_that_is_not_finite_stops_with_advice(lm: PreTrainedModel) -> None:
    reference = pair_logprobs(lm, ROWS, 5, PAD)
    with torch.no_grad():
        lm.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"dpo: the loss is nan .*lower dpo\.learning_rate"):
        train(lm, dpo_params(), reference)
