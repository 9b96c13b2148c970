"""The losses of a reward model: on pairs, and on ratings."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairwiseStats(NamedTuple):
    """What a batch of pairs says about the reward model; all scalars."""

    accuracy: Tensor
    """Share of the pairs whose chosen response scores higher."""
    margin: Tensor
    """Mean of chosen less rejected score."""


class PointwiseStats(NamedTuple):
    """What a batch of ratings says about the reward model; all scalars."""

    accuracy: Tensor
    """Share of the responses that score above 0 and are good, or below 0 and bad."""


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    centering: float = 0.0,
    num_pairs: Tensor | int | None = None,
) -> tuple[Tensor, PairwiseStats]:
    """Bradley-Terry loss of pairs of scores.

    L = mean(-log sigmoid(r_c - r_r - margin) + centering * (r_c + r_r)^2)
    (Ouyang et al. 2022, arXiv 2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv 2307.09288,
    eq. 2; centring: Eisenstein et al. 2023, arXiv 2312.09244, section 2.1).

    Args:
        chosen: [B], scores of the preferred responses.
        rejected: [B], scores of the others.
        margin: [B] or a number, by how much the scores should differ at least.
        centering: weight of the term that pulls the scores of a pair to a sum of 0.
        num_pairs: of the whole mini-batch, where this is one micro-batch of it; none counts here.
    """
    difference = chosen - rejected
    loss = -logsigmoid(difference - margin)
    if centering:
        loss = loss + centering * (chosen + rejected).square()
    stats = PairwiseStats((difference > 0).float().mean(), difference.mean())
    total = len(chosen) if num_pairs is None else num_pairs
    return loss.sum() / total, PairwiseStats(*(value.detach() for value in stats))


def pointwise_loss(
    scores: Tensor, labels: Tensor, num_rows: Tensor | int | None = None
) -> tuple[Tensor, PointwiseStats]:
    """Binary cross-entropy of ratings, with sigmoid(r) as the probability of a good response.

    L = mean(-log sigmoid(r) where good, -log sigmoid(-r) where bad)
    (Goodfellow et al. 2016, "Deep Learning", section 6.2.2.2).

    Args:
        scores: [B].
        labels: bool [B], True = good.
        num_rows: of the whole mini-batch, where this is one micro-batch of it; none counts here.
    """
    margin = label_margin(scores, labels)
    total = len(scores) if num_rows is None else num_rows
    return -logsigmoid(margin).sum() / total, PointwiseStats((margin > 0).float().mean().detach())


def label_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """How far each score is on its label's side of 0: scores [B], labels bool [B], to [B]."""
    return torch.where(labels, scores, -scores)
