"""Reward-model training on pairs and ratings: accumulation, padding, and normalisation."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.params.schema import RewardModelParams
from plumbline.training.precision import autocast
from plumbline.training.reporting import ignore_progress
from plumbline.training.reward_model import (
    normalise_on,
    score_pairs,
    score_ratings,
    score_texts,
    train_reward_model,
)

PAD, EOS = 0, 1
# The chosen responses hold token 200, the rejected ones 201; 14 pairs, so that the last of the
# batches of 8 is short.
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [3, *range(10 + row, 12 + row + row % 4), EOS, 4],
        "chosen": [*range(40 + row, 41 + row + (row * 5) % 9), 200, EOS],
        "rejected": [*range(60 + row, 61 + row + (row * 7) % 5), 201, EOS],
    }
    for row in range(14)
]
# Uneven numbers of good and bad ones.
RATINGS: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "response": row[side], "label": side == "chosen"}
    for row in ROWS
    for side in (("chosen", "rejected") if row["prompt"][1] % 3 != 1 else ("rejected",))
]
OBJECTIVES = pytest.mark.parametrize("objective", ["pairwise", "pointwise"])
DEMONSTRATIONS = [[*row["prompt"], *row["chosen"]] for row in ROWS]


def rm_params(**changes: Any) -> RewardModelParams:
    defaults: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
    }
    return RewardModelParams(**{**defaults, **changes})


def train(
    model: PreTrainedModel,
    params: RewardModelParams,
    rows: list[dict[str, Any]] | None = None,
    seed: int = 0,
    pad: int = PAD,
) -> list[Mapping[str, float]]:
    history: list[Mapping[str, float]] = []
    if rows is None:
        rows = ROWS if params.objective == "pairwise" else RATINGS
    train_reward_model(
        model, rows, params, pad_token_id=pad, seed=seed,
        log=lambda _, metrics: history.append(metrics), progress=ignore_progress,
    )  # fmt: skip
    return history


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def naive_score(model: PreTrainedModel, sequence: list[int]) -> float:
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


def naive_loss(model: PreTrainedModel, margin: float, centering: float) -> float:
    terms = []
    for row in ROWS:
        chosen, rejected = (
            naive_score(model, [*row["prompt"], *row[side]]) for side in ("chosen", "rejected")
        )
        probability = 1 / (1 + math.exp(-(chosen - rejected - margin)))
        terms.append(-math.log(probability) + centering * (chosen + rejected) ** 2)
    return math.fsum(terms) / len(terms)


def test_the_model_learns_what_is_preferred(scorer: PreTrainedModel) -> None:
    train(scorer, rm_params(epochs=15))
    scores = score_pairs(scorer, ROWS, 5, PAD)
    assert bool((scores.chosen > scores.rejected).all())
    assert not scorer.training


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.05)])
def test_the_first_logged_loss_is_the_pairwise_loss(
    scorer: PreTrainedModel, margin: float, centering: float
) -> None:
    # Ten steps on all rows at a rate that moves nothing: the mean of ten equal losses.
    expected = naive_loss(scorer, margin, centering)
    params = rm_params(
        epochs=10, batch_size=14, micro_batch_tokens=200, learning_rate=1e-12, centering=centering
    )
    rows = [{**row, "margin": margin} for row in ROWS] if margin else ROWS
    history = train(scorer, params, rows)
    assert history[0]["reward_model/loss"] == pytest.approx(expected, rel=1e-4)


def test_raters_labels_are_learned(scorer: PreTrainedModel) -> None:
    train(scorer, rm_params(objective="pointwise", epochs=15))
    scores = score_ratings(scorer, RATINGS, 5, PAD)
    assert [score > 0 for score in scores.tolist()] == [row["label"] for row in RATINGS]


def test_the_first_logged_loss_is_the_cross_entropy_of_the_labels(scorer: PreTrainedModel) -> None:
    terms = []
    for row in RATINGS:
        good = 1 / (1 + math.exp(-naive_score(scorer, [*row["prompt"], *row["response"]])))
        terms.append(-math.log(good if row["label"] else 1 - good))
    # Mini-batches of all 23 rows, the last micro-batch of which is short.
    params = rm_params(
        objective="pointwise", epochs=10, batch_size=24, micro_batch_tokens=150, learning_rate=1e-12
    )
    history = train(scorer, params)
    expected = math.fsum(terms) / len(terms)
    assert history[0]["reward_model/loss"] == pytest.approx(expected, rel=1e-4)


def test_a_judge_has_its_own_names_for_the_curves(scorer: PreTrainedModel) -> None:
    history: list[Mapping[str, float]] = []
    train_reward_model(
        scorer, ROWS, rm_params(), pad_token_id=PAD, seed=0, progress=ignore_progress,
        log=lambda _, metrics: history.append(metrics), prefix="judge",
    )  # fmt: skip
    own = {name for name in history[0] if not name.startswith(("perf/", "time/"))}
    assert own == {"judge/loss", "judge/grad_norm", "judge/lr", "judge/epoch"}


@OBJECTIVES
def test_micro_batches_leave_the_training_the_same(scorer: PreTrainedModel, objective: str) -> None:
    trained = {}
    for size in (4096, 100, 1):
        model = copy.deepcopy(scorer)
        train(model, rm_params(objective=objective, micro_batch_tokens=size, learning_rate=5e-4))
        trained[size] = weights(model)
    assert float((trained[4096] - weights(scorer)).abs().max()) > 5e-4
    for size in (100, 1):
        torch.testing.assert_close(trained[size], trained[4096], atol=1e-6, rtol=0)


@OBJECTIVES
def test_recomputed_activations_leave_the_training_the_same(
    scorer: PreTrainedModel, objective: str
) -> None:
    other = copy.deepcopy(scorer)
    train(scorer, rm_params(objective=objective, learning_rate=5e-4))
    train(
        other,
        rm_params(objective=objective, learning_rate=5e-4, gradient_checkpointing=True),
    )
    torch.testing.assert_close(weights(scorer), weights(other), atol=1e-6, rtol=0)


@OBJECTIVES
def test_the_pad_token_does_not_matter(scorer: PreTrainedModel, objective: str) -> None:
    other = copy.deepcopy(scorer)
    train(scorer, rm_params(objective=objective))
    train(other, rm_params(objective=objective), pad=EOS)
    torch.testing.assert_close(weights(scorer), weights(other), atol=1e-6, rtol=0)


def test_the_seed_decides_every_bit(scorer: PreTrainedModel) -> None:
    trained = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(scorer)
        train(model, rm_params(), seed=seed)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_scores_of_pairs_are_those_of_each_sequence_alone(
    scorer: PreTrainedModel, max_tokens: int, pad: int
) -> None:
    scores = score_pairs(scorer, ROWS, max_tokens, pad)
    for side in ("chosen", "rejected"):
        expected = [naive_score(scorer, [*row["prompt"], *row[side]]) for row in ROWS]
        assert getattr(scores, side).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
def test_scores_of_ratings_are_those_of_each_sequence_alone(
    scorer: PreTrainedModel, max_tokens: int
) -> None:
    scores = score_ratings(scorer, RATINGS, max_tokens, EOS)
    expected = [naive_score(scorer, [*row["prompt"], *row["response"]]) for row in RATINGS]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_demonstrations_get_mean_0(scorer: PreTrainedModel) -> None:
    before = score_texts(scorer, DEMONSTRATIONS, 4, PAD)
    mean, std, metrics = normalise_on(scorer, DEMONSTRATIONS, rm_params(normalize="mean"), PAD)
    after = score_texts(scorer, DEMONSTRATIONS, 14, PAD)
    torch.testing.assert_close(after, before - before.mean(), atol=1e-4, rtol=0)
    assert (mean, std) == (pytest.approx(float(before.mean())), 1.0)
    assert metrics == pytest.approx(
        {
            "reward_model/raw_mean": float(before.mean()),
            "reward_model/raw_std": float(before.std()),
            "reward_model/normalised_mean": 0.0,
            "reward_model/normalised_std": float(before.std()),
        },
        abs=1e-4,
    )


def test_demonstrations_get_std_1_where_asked(scorer: PreTrainedModel) -> None:
    before = score_texts(scorer, DEMONSTRATIONS, 14, PAD)
    mean, std, metrics = normalise_on(
        scorer, DEMONSTRATIONS, rm_params(normalize="mean_std"), PAD, "judge"
    )
    after = score_texts(scorer, DEMONSTRATIONS, 14, PAD)
    assert float(after.mean()) == pytest.approx(0, abs=1e-4)
    assert float(after.std()) == pytest.approx(1, abs=1e-4)
    assert metrics["judge/normalised_std"] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(after * std + mean, before, atol=1e-4, rtol=0)


def test_normalised_scores_are_seen_inside_one_autocast(scorer: PreTrainedModel) -> None:
    # It keeps narrow copies of the weights, which the normalisation changes.
    with autocast(scorer.device, "bf16"):
        before = score_texts(scorer, DEMONSTRATIONS, 14, PAD)
        mean, std, metrics = normalise_on(
            scorer, DEMONSTRATIONS, rm_params(normalize="mean_std"), PAD
        )
        after = score_texts(scorer, DEMONSTRATIONS, 14, PAD)
    assert abs(std - 1) > 0.1
    assert metrics["reward_model/normalised_std"] == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(after, (before - mean) / std, atol=0.1, rtol=0)
    assert before.dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_with_advice(scorer: PreTrainedModel) -> None:
    with torch.no_grad():
        scorer.score.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"reward_model: .*lower reward_model\.learning_rate"):
        train(scorer, rm_params(epochs=6))
