"""What SFT and reward-model training share: transformers' Trainer, set up from the params."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from plumbline.data.batches import micro_batches
from plumbline.params.schema import SupervisedParams
from plumbline.training.checkpoint import Checkpoints
from plumbline.training.memory import checkpointing, memory_advice, training_ways
from plumbline.training.perf import Cost, Pace, Work, matmul_rate
from plumbline.training.precision import Precision
from plumbline.training.reporting import Log, Progress
from plumbline.training.trainer import Listeners, ResumableTrainer, Stats


def fit(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Tensor]],
    params: SupervisedParams,
    *,
    section: str,
    lengths: Callable[[Mapping[str, Any]], Sequence[int]],
    shared: Callable[[Mapping[str, Any]], int] = lambda _: 0,
    predicting: Callable[[Mapping[str, Any]], int],
    packed: bool,
    loss: Callable[[Any, Tensor, Tensor | int | None], Tensor],
    seed: int,
    precision: Precision,
    log: Log,
    progress: Progress,
    stats: Stats | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `model` in place on `rows`, from the newest checkpoint on where there is one.

    Args:
        model: its forward takes what `collate` makes.
        rows: the training rows.
        collate: rows to a micro-batch.
        params: batches, epochs, learning rate.
        section: the params section, for messages and metric names.
        lengths: of a row's sequences, tokens.
        shared: tokens that a packed model does not compute again, since two of a row's sequences
            begin with them.
        predicting: tokens of a row that the model's head is asked about.
        packed: whether the model takes a micro-batch without padding.
        loss: (outputs, labels, num_items_in_batch: labels of the mini-batch that count) to a
            scalar.
        seed: of the shuffles.
        precision: of the matrix products.
        log: called with the optimizer step and its metrics.
        progress: called with rows done and rows in all.
        stats: more metrics, asked for right before each log.
        checkpoints: of this training; none are kept without them.

    Raises:
        TrainingError: a loss or a gradient is not finite, or the GPU's memory is full.
    """

    cost = Cost.of(model)

    def spared(row: Mapping[str, Any]) -> int:
        return shared(row) if packed else 0

    def size(row: Mapping[str, Any]) -> int:
        of = lengths(row)
        return sum(of) - spared(row) if packed else len(of) * max(of)

    def split(batch: list[Mapping[str, Any]]) -> dict[str, Any]:
        sizes = [*map(size, batch)]
        groups = micro_batches(sizes, params.micro_batch_tokens, packed=packed)
        parts = [collate([batch[place] for place in group]) for group in groups]
        every = [length for row in batch for length in lengths(row)]
        read = sum(every) - sum(map(spared, batch))
        computed = read if packed else sum(map(_elements, parts))
        flops = cost.training(every, sum(map(predicting, batch)))
        flops -= cost.training([*map(spared, batch)], 0)
        work = Work(read, computed, flops)
        return {"micro_batches": parts, "work": work, "rows": len(batch)}

    steps = params.epochs * math.ceil(len(rows) / params.batch_size)
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            per_device_train_batch_size=params.batch_size,
            num_train_epochs=params.epochs,
            learning_rate=params.learning_rate,
            lr_scheduler_type=(
                "constant_with_warmup" if params.schedule == "constant" else params.schedule
            ),
            warmup_steps=math.ceil(params.warmup_fraction * steps),
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            adam_epsilon=1e-5,
            seed=seed,
            data_seed=seed,
            bf16=precision == "bf16",
            # Asked for bf16, it expects a GPU unless it is told otherwise.
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        pace = Pace(matmul_rate(next(model.parameters()).device, precision))
        trainer = ResumableTrainer(
            listeners=Listeners(section, len(rows) * params.epochs, log, progress, stats, pace),
            checkpoints=checkpoints,
            stats=stats,
            pace=pace,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=split,
            compute_loss_func=loss,
        )
        ways = training_ways(
            section, params.micro_batch_tokens, max(map(size, rows)),
            params.gradient_checkpointing,
        )  # fmt: skip
        with (
            trainer.keeper.watching(),
            memory_advice(section, [*ways]),
            checkpointing(model) if params.gradient_checkpointing else nullcontext(),
        ):
            trainer.fit()


def _elements(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a padded micro-batch."""
    return max(tensor.numel() for tensor in batch.values())
