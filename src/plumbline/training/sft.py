"""Supervised fine-tuning: the language model learns the demonstrations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.data.collate import sft_batch
from plumbline.losses.sft import IGNORE, sft_loss
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
        return sft_batch(
            [row["prompt"] for row in batch],
            [row["response"] for row in batch],
            pad_token_id,
            train_on_prompt=params.train_on_prompt,
        )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        return sft_loss(outputs.logits, labels, num_items_in_batch)

    model.train()
    with trained_as_adapter(model, params.lora, seed):
        fit(
            model, rows, collate, params,
            section="sft", loss=loss, seed=seed, precision=precision, log=log, progress=progress,
            checkpoints=checkpoints,
        )  # fmt: skip
    model.eval()


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, rows: Sequence[Row], batch_size: int, pad_token_id: int
) -> float:
    """Mean cross-entropy of the response tokens of all rows, in nats a token."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = sft_batch(
            [row["prompt"] for row in part], [row["response"] for row in part], pad_token_id
        )
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        total += sft_loss(model(**batch).logits, labels, 1).item()
        count += int((labels != IGNORE).sum())
    return total / count
