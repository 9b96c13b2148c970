"""From sampled responses to what an update needs: log-probs, values, rewards, advantages."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.data.batches import micro_batches
from plumbline.data.collate import pad_left
from plumbline.models.packed_attention import take_packed
from plumbline.models.scalar_head import sequence_scores, token_values
from plumbline.models.states import HeadStates, states_before, token_stats
from plumbline.ops.linear_logprobs import TokenStats
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

    def spread(self, values: Tensor) -> Tensor:
        """Put numbers of the response tokens, [N] row by row, in their places: [B, R], else 0."""
        return values.new_zeros(self.response_mask.shape).masked_scatter(self.response_mask, values)

    def micro_batches(self, max_tokens: int | None, *, packed: bool) -> list[Tensor]:
        """The rows in groups of at most so many tokens, or in one: `data.batches.micro_batches`."""
        if max_tokens is None:
            return [torch.arange(len(self.ids), device=self.ids.device)]
        tokens, said = self.mask.sum(1), self.response_mask.sum(1)
        # Padded on both sides, a group is as wide as its longest query and longest response.
        lengths = tokens if packed else said + (tokens - said).max()
        groups = micro_batches(lengths.tolist(), max_tokens, packed=packed)
        return [torch.tensor(group, device=self.ids.device) for group in groups]


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


def response_states(model: PreTrainedModel, sequences: Sequences) -> HeadStates:
    """Run a language model up to its head, and keep what predicts the response tokens, [N, H]."""
    queries = sequences.ids.shape[1] - sequences.response_mask.shape[1]
    targets = nn.functional.pad(sequences.response_mask, (queries, 0))
    return states_before(model, sequences.ids, sequences.mask, targets)


def response_stats(
    model: PreTrainedModel, states: HeadStates, sequences: Sequences, temperature: float
) -> TokenStats:
    """Log-probability of every response token and entropy before it: [B, R] each, 0 on padding."""
    tokens = sequences.response_ids[sequences.response_mask]
    stats = token_stats(model, states, tokens, temperature)
    return TokenStats(*(sequences.spread(values) for values in stats))


def response_logprobs(model: PreTrainedModel, sequences: Sequences, temperature: float) -> Tensor:
    """Log-probability of every response token: [B, R], nats, 0 on padding."""
    states = response_states(model, sequences)
    return response_stats(model, states, sequences, temperature).logprobs


def response_values(critic: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The critic's value before each response token: [B, R]."""
    width = sequences.response_mask.shape[1]
    return token_values(critic, sequences.ids, sequences.mask)[:, -width - 1 : -1]


@torch.no_grad()
def score_sequences(
    reward_model: PreTrainedModel, sequences: Sequences, max_tokens: int | None = None
) -> Tensor:
    """The reward model's score at the last token of each response: [B].

    At most `max_tokens` tokens are scored at a time, or all at once.
    """
    scores = sequences.ids.new_zeros(len(sequences.ids), dtype=torch.float32)
    for rows in sequences.micro_batches(max_tokens, packed=take_packed(reward_model)):
        part = sequences.rows(rows)
        scores[rows] = sequence_scores(reward_model, part.ids, part.mask).float()
    return scores
