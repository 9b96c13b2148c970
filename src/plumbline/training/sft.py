"""Supervised fine-tuning: the language model learns the demonstrations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.batches import micro_batches
from plumbline.data.collate import sft_batch
from plumbline.losses.sft import IGNORE, sft_loss
from plumbline.models.packed_attention import take_packed
from plumbline.models.states import states_before, token_stats
from plumbline.params.schema import SFTParams
from plumbline.training.checkpoint import Checkpoints
from plumbline.training.lora import trained_as_adapter
from plumbline.training.precision import Precision
from plumbline.training.reporting import Log, Progress
from plumbline.training.supervised import fit

Row = Mapping[str, list[int]]
"""`prompt` and `response`, each token ids."""


def train_sft(
    model: PreTrainedModel,
    rows: Sequence[Row],
    params: SFTParams,
    *,
    pad_token_id: int,
    seed: int,
    precision: Precision = "fp32",
    log: Log,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `model` in place on the demonstrations `rows`, from the newest checkpoint on.

    Raises:
        TrainingError: a loss or a gradient is not finite, or the GPU's memory is full.
    """

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        return _batch(batch, pad_token_id, train_on_prompt=params.train_on_prompt)

    def predicting(row: Row) -> int:
        return _tokens(row) - 1 if params.train_on_prompt else len(row["response"])

    def loss(logprobs: Tensor, _: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        assert num_items_in_batch is not None
        return sft_loss(logprobs, num_items_in_batch)

    model.train()
    with trained_as_adapter(model, params.lora, seed):
        fit(
            _Reader(model), rows, collate, params,
            section="sft", lengths=lambda row: [_tokens(row)], predicting=predicting,
            packed=take_packed(model), loss=loss, seed=seed, precision=precision,
            log=log, progress=progress, checkpoints=checkpoints,
        )  # fmt: skip
    model.eval()


class _Reader(nn.Module):
    """The model with log-probabilities as its forward, which the Trainer sees."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, counted: Tensor) -> Tensor:
        """Log-probability of each counted token: ids, mask and counted [B, T] to [N], nats."""
        states = states_before(self.model, input_ids, attention_mask.bool(), counted)
        return token_stats(self.model, states, input_ids[counted]).logprobs


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, rows: Sequence[Row], max_tokens: int, pad_token_id: int
) -> float:
    """Mean cross-entropy of the response tokens of all rows, in nats a token.

    At most `max_tokens` tokens are read at a time.
    """
    reader = _Reader(model)
    total, count = 0.0, 0
    for group in micro_batches([*map(_tokens, rows)], max_tokens, packed=take_packed(model)):
        batch = _batch([rows[place] for place in group], pad_token_id)
        del batch["labels"]
        logprobs = reader(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        total -= logprobs.sum().item()
        count += len(logprobs)
    return total / count


def _tokens(row: Row) -> int:
    return len(row["prompt"]) + len(row["response"])


def _batch(
    rows: Sequence[Row], pad_token_id: int, *, train_on_prompt: bool = False
) -> dict[str, Tensor]:
    batch = sft_batch(
        [row["prompt"] for row in rows],
        [row["response"] for row in rows],
        pad_token_id,
        train_on_prompt=train_on_prompt,
    )
    return {**batch, "counted": batch["labels"] != IGNORE}
