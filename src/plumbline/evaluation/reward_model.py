"""What held-out judgements say about a reward model, or about a judge."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from plumbline.evaluation.scores import (
    CalibrationBin,
    correlation,
    expected_calibration_error,
    label_calibration,
    pair_calibration,
    wilson_interval,
)
from plumbline.losses.preference import label_margin
from plumbline.training.reward_model import (
    Normalisation,
    PairScores,
    Row,
    score_pairs,
    score_ratings,
)


class HeldOut(NamedTuple):
    """The measurements, and what they were made from."""

    metrics: dict[str, float]
    pairs: PairScores
    """Normalised scores, as the model is saved."""
    calibration: list[CalibrationBin]
    """Of the probabilities that the model was trained to state; empty where no label is known."""


def measure_reward_model(
    model: PreTrainedModel,
    pairs: Sequence[Row],
    ratings: Sequence[Row] | None,
    normalisation: Normalisation,
    *,
    max_tokens: int,
    pad_token_id: int,
    prefix: str = "reward_model",
) -> HeldOut:
    """Accuracy, calibration and length bias of a normalised model on held-out judgements.

    Pairs that are known to have the wrong label (`clean` is False) count only in
    `accuracy_all_labels`. The calibration is that of the probabilities that the model was trained
    to state, sigmoid(r_chosen - r_rejected) of a pair or sigmoid(r) of a rating. They are those of
    the scores before normalisation, whose scale and zero would state others.

    Args:
        model: a scalar model after `normalise_on`.
        pairs: held-out pairs.
        ratings: held-out ratings, for a model that was trained on ratings; else none.
        normalisation: what `normalise_on` did to the model.
        max_tokens: scored at a time.
        pad_token_id: fills up the batches.
        prefix: of the metrics' names, `reward_model` or `judge`.
    """
    scores = score_pairs(model, pairs, max_tokens, pad_token_id)
    margins = (scores.chosen - scores.rejected).tolist()
    clean = [m for m, row in zip(margins, pairs, strict=True) if row.get("clean", True)]
    calibration = pair_calibration([margin * normalisation.std for margin in clean])
    metrics = {
        "accuracy_all_labels": sum(margin > 0 for margin in margins) / len(margins),
        "score_length_correlation": correlation(
            [*scores.chosen.tolist(), *scores.rejected.tolist()],
            [len(row[side]) for side in PairScores._fields for row in pairs],
        ),
    }
    # A data set may know each of its few held-out labels to be wrong.
    if clean:
        metrics |= _shares("accuracy", clean) | {"margin_mean": sum(clean) / len(clean)}
    if ratings is not None:
        rated = score_ratings(model, ratings, max_tokens, pad_token_id)
        raw = rated * normalisation.std + normalisation.mean
        labels = [bool(row["label"]) for row in ratings]
        metrics |= _shares("label_accuracy", label_margin(raw, torch.tensor(labels)).tolist())
        calibration = label_calibration(raw.tolist(), labels)
    if calibration:
        metrics["calibration_error"] = expected_calibration_error(calibration)
    named = {f"{prefix}/{name}": value for name, value in metrics.items()}
    return HeldOut(named, scores, calibration)


def _shares(name: str, margins: Sequence[float]) -> dict[str, float]:
    """Share of positive margins, with its 95% interval."""
    share = wilson_interval(sum(margin > 0 for margin in margins), len(margins))
    return {name: share.mean, f"{name}_low": share.low, f"{name}_high": share.high}
