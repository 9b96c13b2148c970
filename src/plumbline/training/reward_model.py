"""Reward-model training: a scalar head learns which of two responses people prefer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.collate import pad_right
from plumbline.losses.preference import pairwise_loss
from plumbline.models.scalar_head import normalise_scores, sequence_scores
from plumbline.params.schema import RewardModelParams
from plumbline.training.reporting import Log, Progress
from plumbline.training.supervised import fit

Row = Mapping[str, Any]
"""`prompt`, `chosen` and `rejected`, each token ids; `margin`, where the data has it."""


class PairScores(NamedTuple):
    """Scores of held-out pairs."""

    chosen: Tensor
    """[N]."""
    rejected: Tensor
    """[N]."""


class _PairScorer(nn.Module):
    """The reward model with scoring as its forward, which is what the Trainer's wrappers see."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> PairScores:
        """Scores of ids [2B, T], the chosen first, then the rejected."""
        return PairScores(*sequence_scores(self.model, ids, mask).chunk(2))


def train_reward_model(
    model: PreTrainedModel,
    rows: Sequence[Row],
    params: RewardModelParams,
    *,
    pad_token_id: int,
    seed: int,
    log: Log,
    progress: Progress,
) -> None:
    """Train the scalar model in place on pairs of responses.

    Raises:
        TrainingError: the loss is not finite.
    """

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        pairs = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") for row in batch]
        ids, mask = pad_right(pairs, pad_token_id)
        margins = torch.tensor([float(row.get("margin", 0.0)) for row in batch])
        # The Trainer counts the labels of a whole mini-batch: here, its pairs.
        return {"ids": ids, "mask": mask, "labels": margins}

    def loss(
        scores: PairScores, margins: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        return pairwise_loss(*scores, margins, params.centering, num_items_in_batch)[0]

    model.train()
    fit(
        _PairScorer(model), rows, collate, params,
        section="reward_model", loss=loss, seed=seed, log=log, progress=progress,
    )  # fmt: skip
    model.eval()


@torch.no_grad()
def score_texts(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch_size: int, pad_token_id: int
) -> Tensor:
    """Score of each sequence of token ids (prompt and response): [N], on the CPU."""
    scores = []
    for start in range(0, len(sequences), batch_size):
        ids, mask = pad_right(sequences[start : start + batch_size], pad_token_id)
        scores.append(sequence_scores(model, ids.to(model.device), mask.to(model.device)).cpu())
    return torch.cat(scores)


def score_pairs(
    model: PreTrainedModel, rows: Sequence[Row], batch_size: int, pad_token_id: int
) -> PairScores:
    """Scores of both responses of each pair."""
    return PairScores(
        *(
            score_texts(
                model, [[*row["prompt"], *row[side]] for row in rows], batch_size, pad_token_id
            )
            for side in ("chosen", "rejected")
        )
    )


def normalise_on(
    model: PreTrainedModel,
    demonstrations: Sequence[Sequence[int]],
    params: RewardModelParams,
    pad_token_id: int,
) -> dict[str, float]:
    """Shift, and if asked scale, the scores so that the demonstrations have mean 0 (and std 1).

    Returns the mean and std before, and the mean after, as metrics.
    """
    before = score_texts(model, demonstrations, params.micro_batch_size, pad_token_id)
    std = float(before.std()) if params.normalize == "mean_std" else 1.0
    normalise_scores(model, float(before.mean()), std)
    after = score_texts(model, demonstrations, params.micro_batch_size, pad_token_id)
    return {
        "reward_model/raw_mean": float(before.mean()),
        "reward_model/raw_std": float(before.std()),
        "reward_model/normalised_mean": float(after.mean()),
        "reward_model/normalised_std": float(after.std()),
    }
