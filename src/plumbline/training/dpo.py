"""DPO: the policy learns the preferences themselves, without a reward model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.batches import micro_batches
from plumbline.data.collate import pad_right
from plumbline.data.pairs import (
    SIDES,
    computed_tokens,
    pair_lengths,
    pair_sequences,
    shared_tokens,
)
from plumbline.evaluation.scores import wilson_interval
from plumbline.losses.dpo import DPOStats, dpo_loss
from plumbline.models.packed_attention import take_packed
from plumbline.models.states import states_before, token_stats
from plumbline.params.schema import DPOParams
from plumbline.training.checkpoint import Checkpoints, State
from plumbline.training.precision import Precision
from plumbline.training.reporting import Log, Progress
from plumbline.training.supervised import fit

Row = Mapping[str, Any]
"""`prompt`, `chosen` and `rejected`, each token ids; `clean`, where the data has it."""


class PairLogprobs(NamedTuple):
    """Log-probabilities of the whole responses of pairs, nats."""

    chosen: Tensor
    """[N]."""
    rejected: Tensor
    """[N]."""


class _PairReader(nn.Module):
    """The policy with the log-probabilities of pairs as its forward, which the Trainer sees."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, response_mask: Tensor) -> PairLogprobs:
        """Log-probabilities of a `pair_batch`."""
        logprobs = sequence_logprobs(self.model, ids, mask, response_mask)
        return PairLogprobs(*logprobs.view(-1, 2).unbind(1))


def train_dpo(
    policy: PreTrainedModel,
    rows: Sequence[Row],
    reference: PairLogprobs,
    params: DPOParams,
    *,
    pad_token_id: int,
    seed: int,
    precision: Precision = "fp32",
    log: Log,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train `policy` in place on pairs of responses.

    Args:
        policy: starts as the reference, also where a checkpoint takes it further.
        rows: the pairs.
        reference: `pair_logprobs` of the rows under the reference policy, so that no second model
            is in memory during the training.
        params: batches, epochs, learning rate, beta.
        pad_token_id: fills up the batches.
        seed: of the shuffles.
        precision: of the matrix products; that of `reference`, too.
        log: called with the optimizer step and its metrics.
        progress: called with rows done and rows in all.
        checkpoints: of this training, which goes on from the newest one.

    Raises:
        TrainingError: a loss or a gradient is not finite, or the GPU's memory is full.
        ValueError: `reference` is not of these rows.
    """
    if not len(rows) == len(reference.chosen) == len(reference.rejected):
        raise ValueError(
            f"train_dpo: expected reference log-probabilities of {len(rows)} pairs, got "
            f"{len(reference.chosen)} of chosen and {len(reference.rejected)} of rejected responses"
        )
    means = _Means()

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        # The Trainer counts the labels of a whole mini-batch: here, the places of its pairs.
        places = torch.tensor([row["place"] for row in batch])
        return {**pair_batch(batch, pad_token_id), "labels": places}

    def loss(
        logprobs: PairLogprobs, places: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        ref_chosen, ref_rejected = (part.to(places.device)[places] for part in reference)
        value, stats = dpo_loss(
            logprobs.chosen, logprobs.rejected, ref_chosen, ref_rejected,
            params.beta, params.label_smoothing, num_items_in_batch,
        )  # fmt: skip
        means.add(stats, len(places))
        return value

    policy.train()
    fit(
        _PairReader(policy), [{**row, "place": place} for place, row in enumerate(rows)], collate,
        params, section="dpo", lengths=pair_lengths, shared=shared_tokens,
        predicting=_predicting, packed=take_packed(policy), loss=loss, seed=seed,
        precision=precision, log=log, progress=progress, stats=means, checkpoints=checkpoints,
    )  # fmt: skip
    policy.eval()


def pair_batch(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pairs to `ids`, `mask` and `response_mask`, all [2B, T]: chosen, rejected, chosen, …"""
    ids, mask = pad_right(pair_sequences(rows), pad_token_id)
    starts = torch.tensor([len(row["prompt"]) for row in rows for _ in SIDES])
    in_response = torch.arange(ids.shape[1]) >= starts.unsqueeze(1)
    return {"ids": ids, "mask": mask, "response_mask": mask & in_response}


def sequence_logprobs(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, response_mask: Tensor
) -> Tensor:
    """Log-probability of each response given its prompt: [B], nats.

    Args:
        model: a causal language model.
        ids: int64 [B, T], prompts with responses, right-padded; rows 2i and 2i + 1 are a pair.
        mask: bool [B, T], True = a token of prompt or response.
        response_mask: bool [B, T], True = a token of the response.
    """
    states = states_before(model, ids, mask, response_mask, pairs=True)
    logprobs = token_stats(model, states, ids[response_mask]).logprobs
    return logprobs.new_zeros(mask.shape).masked_scatter(response_mask, logprobs).sum(1)


@torch.no_grad()
def pair_logprobs(
    model: PreTrainedModel, rows: Sequence[Row], max_tokens: int, pad_token_id: int
) -> PairLogprobs:
    """Log-probabilities of both responses of each pair, on the CPU.

    At most `max_tokens` tokens are read at a time.
    """
    logprobs = torch.empty(len(rows), 2)
    packed = take_packed(model)
    sizes = [computed_tokens(row, packed=packed) for row in rows]
    for group in micro_batches(sizes, max_tokens, packed=packed):
        batch = pair_batch([rows[place] for place in group], pad_token_id)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logprobs[group] = sequence_logprobs(model, **on_device).cpu().view(-1, 2)
    return PairLogprobs(*logprobs.unbind(1))


def _predicting(row: Row) -> int:
    return len(row["chosen"]) + len(row["rejected"])


def held_out_metrics(
    policy: PreTrainedModel,
    rows: Sequence[Row],
    reference: PairLogprobs,
    params: DPOParams,
    pad_token_id: int,
) -> dict[str, float]:
    """The loss on held-out pairs, and how often and by how much the chosen response wins.

    The loss is that of all labels, as in training. Accuracy (with its 95% interval) and margin
    leave out pairs that are known to have the wrong label.
    """
    logprobs = pair_logprobs(policy, rows, params.micro_batch_tokens, pad_token_id)
    loss, _ = dpo_loss(*logprobs, *reference, params.beta, params.label_smoothing)
    metrics = {"dpo/held_out_loss": loss.item()}
    clean = torch.tensor([bool(row.get("clean", True)) for row in rows])
    # A data set may know each of its few held-out labels to be wrong.
    if count := int(clean.sum()):
        chosen, rejected, ref_chosen, ref_rejected = (
            part[clean] for part in (*logprobs, *reference)
        )
        _, stats = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, params.beta)
        accuracy = wilson_interval(int(stats.accuracy), count)
        metrics |= {
            "dpo/held_out_accuracy": accuracy.mean,
            "dpo/held_out_accuracy_low": accuracy.low,
            "dpo/held_out_accuracy_high": accuracy.high,
            "dpo/held_out_margin": stats.margin.item() / count,
        }
    return metrics


class _Means:
    """Means over the pairs since the last log."""

    def __init__(self) -> None:
        self._parts: list[Sequence[Tensor]] = []
        self._pairs = 0

    def add(self, sums: DPOStats, pairs: int) -> None:
        # Left on the device: reading each number would wait for it.
        self._parts.append(sums)
        self._pairs += pairs

    def take(self) -> dict[str, float]:
        totals = torch.stack([torch.stack([*part]) for part in self._parts]).sum(0) / self._pairs
        self._parts, self._pairs = [], 0
        return {
            f"dpo/{name}": value
            for name, value in zip(DPOStats._fields, totals.tolist(), strict=True)
        }

    def state(self) -> State:
        return {"parts": list(self._parts), "pairs": self._pairs}

    def restore(self, state: State) -> None:
        self._parts, self._pairs = state["parts"], state["pairs"]
