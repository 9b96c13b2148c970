"""Reward-model training: a scalar head learns what people prefer, from pairs or from ratings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.batches import micro_batches
from plumbline.data.collate import pad_right
from plumbline.data.pairs import computed_tokens, pair_sequences, shared_tokens
from plumbline.losses.preference import pairwise_loss, pointwise_loss
from plumbline.models.packed_attention import take_packed
from plumbline.models.scalar_head import normalise_scores, sequence_scores
from plumbline.params.schema import RewardModelParams
from plumbline.training.checkpoint import Checkpoints
from plumbline.training.lora import trained_as_adapter
from plumbline.training.precision import Precision
from plumbline.training.reporting import Log, Progress
from plumbline.training.supervised import fit

Row = Mapping[str, Any]
"""`prompt` with `chosen` and `rejected` (and `margin`, where the data has it), or with `response`
and `label` (True = good); texts are token ids."""


class Objective(Protocol):
    """What a reward model learns from a batch of rows."""

    def sequences(self, rows: Sequence[Row]) -> list[list[int]]:
        """The token ids that are scored."""

    def shared(self, row: Row) -> int:
        """How many tokens two sequences of a row begin with alike."""

    def labels(self, rows: Sequence[Row]) -> Tensor:
        """One label a row."""

    def loss(self, scores: Tensor, labels: Tensor, num_rows: Tensor | int | None) -> Tensor:
        """The loss of the scores of `sequences`, divided by the rows of the whole mini-batch."""


class Pairwise(NamedTuple):
    """Of two responses, the chosen one scores higher (Bradley-Terry)."""

    centering: float

    def sequences(self, rows: Sequence[Row]) -> list[list[int]]:
        """Of each row the chosen response after its prompt, then the rejected one."""
        return pair_sequences(rows)

    def shared(self, row: Row) -> int:
        """The prompt's tokens, and those that both responses begin with."""
        return shared_tokens(row)

    def labels(self, rows: Sequence[Row]) -> Tensor:
        """The margins."""
        return torch.tensor([float(row.get("margin", 0.0)) for row in rows])

    def loss(self, scores: Tensor, labels: Tensor, num_rows: Tensor | int | None) -> Tensor:
        """The pairwise loss of scores [2B]."""
        chosen, rejected = scores.view(-1, 2).unbind(1)
        return pairwise_loss(chosen, rejected, labels, self.centering, num_rows)[0]


class Pointwise(NamedTuple):
    """The score says how likely it is that a rater finds the response good."""

    def sequences(self, rows: Sequence[Row]) -> list[list[int]]:
        """Each response after its prompt."""
        return [[*row["prompt"], *row["response"]] for row in rows]

    def shared(self, row: Row) -> int:
        """None: a row has one sequence."""
        return 0

    def labels(self, rows: Sequence[Row]) -> Tensor:
        """Whether the raters called the response good."""
        return torch.tensor([bool(row["label"]) for row in rows])

    def loss(self, scores: Tensor, labels: Tensor, num_rows: Tensor | int | None) -> Tensor:
        """The pointwise loss of scores [B]."""
        return pointwise_loss(scores, labels, num_rows)[0]


def objective_of(params: RewardModelParams) -> Objective:
    """The objective that the params name."""
    return Pairwise(params.centering) if params.objective == "pairwise" else Pointwise()


class _Scorer(nn.Module):
    """The reward model with scoring as its forward, which is what the Trainer's wrappers see."""

    def __init__(self, model: PreTrainedModel, *, pairs: bool) -> None:
        super().__init__()
        self.model = model
        self.pairs = pairs

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores [N] of ids and bool mask [N, T]."""
        return sequence_scores(self.model, ids, mask, pairs=self.pairs)


def train_reward_model(
    model: PreTrainedModel,
    rows: Sequence[Row],
    params: RewardModelParams,
    *,
    pad_token_id: int,
    seed: int,
    precision: Precision = "fp32",
    log: Log,
    progress: Progress,
    prefix: str = "reward_model",
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train the scalar model in place on pairs of responses, or on ratings.

    Args:
        model: the scalar model.
        rows: pairs or ratings, as `params.objective` says.
        params: objective, batches, epochs, learning rate.
        pad_token_id: fills up the batches.
        seed: of the shuffles.
        precision: of the matrix products.
        log: called with the optimizer step and its metrics.
        progress: called with rows done and rows in all.
        prefix: of the metrics' names, `reward_model` or `judge`.
        checkpoints: of this training, which goes on from the newest one.

    Raises:
        TrainingError: a loss or a gradient is not finite, or the GPU's memory is full.
    """
    objective = objective_of(params)

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_right(objective.sequences(batch), pad_token_id)
        # The Trainer counts the labels of a whole mini-batch: here, its rows.
        return {"ids": ids, "mask": mask, "labels": objective.labels(batch)}

    def loss(scores: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        return objective.loss(scores, labels, num_items_in_batch)

    def renamed(step: int, metrics: Mapping[str, float]) -> None:
        mine = "reward_model/"
        log(
            step,
            {
                f"{prefix}/{name.removeprefix(mine)}" if name.startswith(mine) else name: value
                for name, value in metrics.items()
            },
        )

    model.train()
    # A judge is trained by the same section of the params, which is what messages name.
    with trained_as_adapter(model, params.lora, seed):
        fit(
            _Scorer(model, pairs=isinstance(objective, Pairwise)), rows, collate, params,
            section="reward_model", lengths=lambda row: [*map(len, objective.sequences([row]))],
            shared=objective.shared, predicting=lambda _: 0, packed=take_packed(model), loss=loss,
            seed=seed, precision=precision, log=renamed, progress=progress, checkpoints=checkpoints,
        )  # fmt: skip
    model.eval()


class PairScores(NamedTuple):
    """Scores of held-out pairs."""

    chosen: Tensor
    """[N]."""
    rejected: Tensor
    """[N]."""


@torch.no_grad()
def score_texts(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], max_tokens: int, pad_token_id: int
) -> Tensor:
    """Score of each sequence of token ids (prompt and response): [N], on the CPU.

    At most `max_tokens` tokens are read at a time.
    """
    scores = torch.empty(len(sequences))
    for group in micro_batches([*map(len, sequences)], max_tokens, packed=take_packed(model)):
        ids, mask = pad_right([sequences[place] for place in group], pad_token_id)
        part = sequence_scores(model, ids.to(model.device), mask.to(model.device))
        scores[group] = part.float().cpu()
    return scores


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel, rows: Sequence[Row], max_tokens: int, pad_token_id: int
) -> PairScores:
    """Scores of both responses of each pair, on the CPU.

    At most `max_tokens` tokens are read at a time.
    """
    scores = torch.empty(len(rows), 2)
    packed = take_packed(model)
    sizes = [computed_tokens(row, packed=packed) for row in rows]
    for group in micro_batches(sizes, max_tokens, packed=packed):
        ids, mask = pad_right(pair_sequences([rows[place] for place in group]), pad_token_id)
        part = sequence_scores(model, ids.to(model.device), mask.to(model.device), pairs=True)
        scores[group] = part.float().cpu().view(-1, 2)
    return PairScores(*scores.unbind(1))


def score_ratings(
    model: PreTrainedModel, rows: Sequence[Row], max_tokens: int, pad_token_id: int
) -> Tensor:
    """Score of each rated response: [N]."""
    return score_texts(model, Pointwise().sequences(rows), max_tokens, pad_token_id)


class Normalisation(NamedTuple):
    """What was done to the scores: each is now (score - mean) / std."""

    mean: float
    std: float
    metrics: dict[str, float]
    """Mean and std of the demonstrations' scores before (`raw_`) and after (`normalised_`)."""


def normalise_on(
    model: PreTrainedModel,
    demonstrations: Sequence[Sequence[int]],
    params: RewardModelParams,
    pad_token_id: int,
    prefix: str = "reward_model",
) -> Normalisation:
    """Shift, and if asked scale, the scores so that the demonstrations have mean 0 (and std 1)."""
    before = score_texts(model, demonstrations, params.micro_batch_tokens, pad_token_id)
    mean = float(before.mean())
    std = float(before.std()) if params.normalize == "mean_std" else 1.0
    normalise_scores(model, mean, std)
    # Autocast keeps narrow copies of the weights, which have just changed.
    torch.clear_autocast_cache()
    after = score_texts(model, demonstrations, params.micro_batch_tokens, pad_token_id)
    metrics = {
        f"{prefix}/raw_mean": mean,
        f"{prefix}/raw_std": float(before.std()),
        f"{prefix}/normalised_mean": float(after.mean()),
        f"{prefix}/normalised_std": float(after.std()),
    }
    return Normalisation(mean, std, metrics)
