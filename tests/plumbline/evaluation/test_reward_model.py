"""Measurements of a reward model: on clean labels, and on the scores it was trained to give."""

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from plumbline.evaluation.reward_model import HeldOut, measure_reward_model
from plumbline.params.schema import RewardModelParams
from plumbline.training.reward_model import Normalisation, normalise_on

PAD, EOS = 0, 1
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [3, *range(10 + row, 12 + row + row % 4), EOS, 4],
        "chosen": [*range(40 + row, 41 + row + (row * 5) % 9), 200, EOS],
        "rejected": [*range(60 + row, 61 + row + (row * 7) % 5), 201, EOS],
        "clean": row % 4 > 0,
    }
    for row in range(14)
]
RATINGS: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "response": row[side], "label": side == "chosen"}
    for row in PAIRS[:9]
    for side in ("chosen", "rejected")
][:-1]
NO_NORMALISATION = Normalisation(0.0, 1.0, {})


def naive_score(model: PreTrainedModel, sequence: list[int]) -> float:
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


def naive_margins(model: PreTrainedModel) -> list[float]:
    """Chosen less rejected score of each pair."""
    return [
        naive_score(model, [*row["prompt"], *row["chosen"]])
        - naive_score(model, [*row["prompt"], *row["rejected"]])
        for row in PAIRS
    ]


def naive_signed(model: PreTrainedModel) -> list[float]:
    """The score of each rated response, its sign turned where the rater said bad."""
    return [
        naive_score(model, [*row["prompt"], *row["response"]]) * (1 if row["label"] else -1)
        for row in RATINGS
    ]


def naive_calibration(margins: list[float]) -> float:
    """Sum over ten bins from 0.5 to 1 of |right ones - their confidence| / all."""
    bins: list[list[float]] = [[] for _ in range(10)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins[min(int((confidence - 0.5) * 20), 9)].append((margin > 0) - confidence)
    return sum(abs(math.fsum(part)) for part in bins) / len(margins)


def naive_label_calibration(scores: list[float], labels: list[bool]) -> float:
    """Sum over ten bins from 0 to 1 of |good ones - their P(good)| / all."""
    bins: list[list[float]] = [[] for _ in range(10)]
    for score, label in zip(scores, labels, strict=True):
        good = 1 / (1 + math.exp(-score))
        bins[min(int(good * 10), 9)].append(label - good)
    return sum(abs(math.fsum(part)) for part in bins) / len(scores)


def measure(
    model: PreTrainedModel,
    normalisation: Normalisation = NO_NORMALISATION,
    ratings: list[dict[str, Any]] | None = None,
    **options: Any,
) -> HeldOut:
    return measure_reward_model(
        model, PAIRS, ratings, normalisation, max_tokens=4, pad_token_id=PAD, **options
    )


@pytest.fixture
def wide_scorer(scorer: PreTrainedModel) -> PreTrainedModel:
    """Scores with a std of about 3 and a mean of about 1, far from what normalising leaves."""
    with torch.no_grad():
        sequences = [[*row["prompt"], *row["chosen"]] for row in PAIRS]
        scores = torch.tensor([naive_score(scorer, sequence) for sequence in sequences])
        scorer.score.weight.mul_(3 / scores.std())
    return scorer


def normalise(model: PreTrainedModel, how: str) -> Normalisation:
    demonstrations = [[*row["prompt"], *row["chosen"]] for row in PAIRS]
    params = RewardModelParams(normalize=how)  # type: ignore[arg-type]
    return normalise_on(model, demonstrations, params, PAD)


def test_known_wrong_labels_count_only_where_all_labels_do(wide_scorer: PreTrainedModel) -> None:
    metrics = measure(wide_scorer).metrics
    margins = naive_margins(wide_scorer)
    clean = [margin for place, margin in enumerate(margins) if place % 4]
    right = sum(margin > 0 for margin in clean) / len(clean)
    assert metrics["reward_model/accuracy"] == pytest.approx(right)
    assert metrics["reward_model/accuracy_low"] < right < metrics["reward_model/accuracy_high"]
    every = sum(margin > 0 for margin in margins) / len(margins)
    assert metrics["reward_model/accuracy_all_labels"] == pytest.approx(every)
    assert every != right
    assert metrics["reward_model/margin_mean"] == pytest.approx(
        math.fsum(clean) / len(clean), rel=1e-3
    )
    assert metrics["reward_model/calibration_error"] == pytest.approx(
        naive_calibration(clean), abs=1e-4
    )
    assert not any("label_accuracy" in name for name in metrics)


@pytest.mark.parametrize("how", ["mean", "mean_std"])
def test_normalising_does_not_change_the_stated_confidence(
    wide_scorer: PreTrainedModel, how: str
) -> None:
    margins = naive_margins(wide_scorer)
    clean = [margin for place, margin in enumerate(margins) if place % 4]
    normalisation = normalise(wide_scorer, how)
    held_out = measure(wide_scorer, normalisation)
    assert sum(part.size for part in held_out.calibration) == len(clean)
    assert held_out.metrics["reward_model/calibration_error"] == pytest.approx(
        naive_calibration(clean), abs=1e-3
    )
    # The margins that are reported are those of the saved model.
    assert held_out.metrics["reward_model/margin_mean"] == pytest.approx(
        math.fsum(clean) / len(clean) / normalisation.std, rel=1e-3
    )
    saved = (held_out.pairs.chosen - held_out.pairs.rejected).tolist()
    assert saved == pytest.approx([margin / normalisation.std for margin in margins], abs=1e-3)
    assert normalisation.std == (1 if how == "mean" else pytest.approx(3, rel=1e-3))


@pytest.mark.parametrize("how", ["mean", "mean_std"])
def test_a_rating_is_right_on_its_side_of_the_zero_of_training(
    wide_scorer: PreTrainedModel, how: str
) -> None:
    signed = naive_signed(wide_scorer)
    right = sum(score > 0 for score in signed) / len(signed)
    normalisation = normalise(wide_scorer, how)
    held_out = measure(wide_scorer, normalisation, RATINGS)
    metrics = held_out.metrics
    assert sum(part.size for part in held_out.calibration) == len(signed)
    assert metrics["reward_model/label_accuracy"] == pytest.approx(right)
    assert (
        metrics["reward_model/label_accuracy_low"]
        < right
        < metrics["reward_model/label_accuracy_high"]
    )
    raw = [score if row["label"] else -score for score, row in zip(signed, RATINGS, strict=True)]
    labels = [bool(row["label"]) for row in RATINGS]
    assert metrics["reward_model/calibration_error"] == pytest.approx(
        naive_label_calibration(raw, labels), abs=1e-3
    )


def test_length_correlation_is_over_all_responses(wide_scorer: PreTrainedModel) -> None:
    scores, lengths = [], []
    for row in PAIRS:
        for side in ("chosen", "rejected"):
            scores.append(naive_score(wide_scorer, [*row["prompt"], *row[side]]))
            lengths.append(float(len(row[side])))
    mean_score, mean_length = sum(scores) / 28, sum(lengths) / 28
    products = [(s - mean_score) * (n - mean_length) for s, n in zip(scores, lengths, strict=True)]
    spread = math.sqrt(sum((s - mean_score) ** 2 for s in scores))
    spread *= math.sqrt(sum((n - mean_length) ** 2 for n in lengths))
    assert measure(wide_scorer).metrics["reward_model/score_length_correlation"] == pytest.approx(
        sum(products) / spread, abs=1e-3
    )


def test_a_judge_has_the_same_metrics_under_its_own_name(wide_scorer: PreTrainedModel) -> None:
    ours = measure(wide_scorer, ratings=RATINGS).metrics
    judges = measure(wide_scorer, ratings=RATINGS, prefix="judge").metrics
    assert judges == {name.replace("reward_model/", "judge/"): ours[name] for name in ours}


def test_without_a_clean_pair_nothing_is_said_of_clean_ones(scorer: PreTrainedModel) -> None:
    pairs = [{**row, "clean": False} for row in PAIRS]
    metrics = measure_reward_model(
        scorer, pairs, None, NO_NORMALISATION, max_tokens=4, pad_token_id=PAD
    ).metrics
    assert set(metrics) == {
        "reward_model/accuracy_all_labels",
        "reward_model/score_length_correlation",
    }
