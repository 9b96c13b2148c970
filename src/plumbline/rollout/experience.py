"""From sampled responses to what an update needs: log-probs, values, rewards, advantages."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.data.collate import pad_left, position_ids
from plumbline.models.scalar_head import sequence_scores, token_values
from plumbline.ops.logprobs import token_logprobs
from plumbline.rollout.generate import Responses


class Sequences(NamedTuple):
    """Queries with their responses, [query | response], padded at both ends."""

    ids: Tensor
    """int64 [B, Q + R]."""
    mask: Tensor
    """bool [B, Q + R], True = a token of the query or the response."""
    response_mask: Tensor
    """bool [B, R], True = a token of the response."""

    @classmethod
    def join(
        cls, queries: Sequence[Sequence[int]], responses: Responses, pad_token_id: int
    ) -> Self:
        """Left-padded queries and right-padded responses, side by side."""
        query = pad_left(queries, pad_token_id)
        device = responses.ids.device
        return cls(
            torch.cat([query.ids.to(device), responses.ids], 1),
            torch.cat([query.mask.to(device), responses.mask], 1),
            responses.mask,
        )

    @property
    def response_ids(self) -> Tensor:
        """int64 [B, R]."""
        return self.ids[:, -self.response_mask.shape[1] :]

    def rows(self, index: Tensor | slice) -> Self:
        """Some of the sequences, without the columns that are padding in all of them."""
        ids, mask, response_mask = (part[index] for part in self)
        width = response_mask.shape[1]
        longest = int(response_mask.sum(1).max())
        first = int(mask.long().argmax(1).min())
        end = ids.shape[1] - width + longest
        return type(self)(ids[:, first:end], mask[:, first:end], response_mask[:, :longest])


class Experience(NamedTuple):
    """A rollout, ready for the update; [B, R] throughout, R counts response tokens."""

    sequences: Sequences
    logprobs: Tensor
    """Of the policy that sampled, nats."""
    ref_logprobs: Tensor
    """Of the reference, nats."""
    advantages: Tensor
    values: Tensor | None
    """Of the critic, before each token; none without a critic."""
    returns: Tensor | None
    """What the critic learns; none without a critic."""


class ResponseLogits(NamedTuple):
    """What a language model says before each response token; padding means nothing."""

    logits: Tensor
    """[B, R, V], of every response token."""
    hidden: Tensor
    """[B, R, H], the last hidden states behind them."""


def response_logits(model: PreTrainedModel, sequences: Sequences) -> ResponseLogits:
    """Run a language model over the sequences and keep what predicts the responses."""
    width = sequences.response_mask.shape[1]
    kept: list[Tensor] = []
    # Models differ in what they do to the logits, but all feed this layer the last hidden state.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: kept.append(inputs[0])
    )
    try:
        logits = model(
            input_ids=sequences.ids,
            attention_mask=sequences.mask.long(),
            position_ids=position_ids(sequences.mask),
            use_cache=False,
            # Position t predicts token t + 1: one more at the front, none at the end.
            logits_to_keep=width + 1,
        ).logits
    finally:
        hook.remove()
    return ResponseLogits(logits[:, :-1], kept[0][:, :-1])


def response_logprobs(model: PreTrainedModel, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probability of every response token: [B, R], nats."""
    logits = response_logits(model, sequences).logits
    return token_logprobs(logits, sequences.response_ids, temperature)


def response_values(critic: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The critic's value before each response token: [B, R]."""
    width = sequences.response_mask.shape[1]
    return token_values(critic, sequences.ids, sequences.mask)[:, -width - 1 : -1]


@torch.no_grad()
def score_sequences(reward_model: PreTrainedModel, sequences: Sequences, batch_size: int) -> Tensor:
    """The reward model's score at the last token of each response: [B]."""
    scores = []
    for start in range(0, len(sequences.ids), batch_size):
        part = sequences.rows(slice(start, start + batch_size))
        scores.append(sequence_scores(reward_model, part.ids, part.mask))
    return torch.cat(scores)


def pad_columns(parts: list[Tensor], width: int) -> Tensor:
    """Stack micro-batches of different widths: zeros fill up to `width` columns."""
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
