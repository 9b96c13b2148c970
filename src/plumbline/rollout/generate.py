"""Sampling responses from a policy, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from plumbline.data.batches import micro_batches
from plumbline.data.collate import pad_left, position_ids
from plumbline.models.packed_attention import lengths_as_mask, take_packed
from plumbline.ops.logprobs import widen
from plumbline.rollout.cache import RoomyLayer

PREFILL_TOKENS = 4096
"""Of queries that are read at a time."""
PART = 256
"""Of the vocabulary, in which a token is looked for."""
STILL_RUNNING = 0.75
"""Once fewer of the rows go on, the others leave the batch, which costs a copy of the cache."""


class Responses(NamedTuple):
    """What a policy answered to a batch of queries."""

    ids: Tensor
    """int64 [B, R], right-padded, the end token included."""
    mask: Tensor
    """bool [B, R], True from the first token to the end token, or to the last one sampled."""
    has_eos: Tensor
    """bool [B], False where the limit came before a stop token."""
    logprobs: Tensor
    """float32 [B, R], of each token as it was drawn, nats; 0 where the mask is False."""
    computed: int = 0
    """Tokens that the policy read, padding and rows that had ended included."""

    def lists(self) -> list[list[int]]:
        """The responses as lists of token ids, without padding."""
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float,
    generator: torch.Generator,
) -> Responses:
    """Draw a response to each query from softmax(logits / temperature), nothing cut off.

    No top-k, top-p or repetition penalty: the tokens come from the very distribution that the
    update differentiates. A query that stands there several times is read once. A response that
    has ended leaves the batch, and what is drawn does not depend on who is left in it.

    Args:
        model: a causal language model.
        queries: token ids, without padding.
        max_tokens: the longest response, its end token included.
        stop_token_ids: tokens that end a response, each its last one.
        pad_token_id: fills up the responses.
        temperature: divides the logits.
        generator: the only source of randomness.

    Raises:
        ValueError: a query ends in a stop token, so that the model would take it for finished.
    """
    for row, query in enumerate(queries):
        if query[-1] in stop_token_ids:
            raise ValueError(
                f"sample_responses: query {row} ends in the stop token {query[-1]}; expected a "
                "prompt that waits for an answer (check the chat template's generation prompt)"
            )
    device, size = model.device, (len(queries), max_tokens)
    stops = torch.tensor(list(stop_token_ids), device=device)
    # Each token of each row has a number of its own.
    uniform = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    ids = torch.full(size, pad_token_id, device=device)
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    logprobs = torch.zeros(size, device=device)
    has_eos = torch.zeros(len(queries), dtype=torch.bool, device=device)

    batch = _read(model, queries, max_tokens, pad_token_id)
    # Whose row each row of the batch is, and whether it goes on.
    rows = torch.arange(len(queries), device=device)
    running = torch.ones_like(rows, dtype=torch.bool)
    computed = batch.read
    for step in range(max_tokens):
        token, logprob = _draw(batch.logits, temperature, uniform[rows, step])
        live = rows[running]
        ids[live, step], logprobs[live, step] = token[running], logprob[running]
        mask[live, step] = True
        ended = running & torch.isin(token, stops)
        has_eos[rows[ended]] = True
        running = running & ~ended
        left = int(running.sum())
        if not left or step + 1 == max_tokens:
            break
        if left < STILL_RUNNING * len(running):
            kept = running.nonzero().squeeze(1)
            batch, rows, token, running = batch.keep(kept), rows[kept], token[kept], running[kept]
        batch = batch.go_on(model, token, step)
        computed += len(rows)
    longest = int(mask.sum(1).max())
    return Responses(ids[:, :longest], mask[:, :longest], has_eos, logprobs[:, :longest], computed)


class _Batch(NamedTuple):
    """Rows that are sampled from, with all that the model has read of them."""

    cache: Cache
    logits: Tensor
    """[B, V], of the next token."""
    attention: Tensor
    """int64 [B, Q + R], 1 = a token of the query, or any of the response."""
    lengths: Tensor
    """int64 [B], of the queries."""
    width: int
    """Q, of the padded queries."""
    read: int
    """Tokens that the model read to get here."""

    def keep(self, rows: Tensor) -> "_Batch":
        """The batch with these rows alone; its logits are used up."""
        self.cache.reorder_cache(rows)
        return self._replace(attention=self.attention[rows], lengths=self.lengths[rows])

    def go_on(self, model: PreTrainedModel, token: Tensor, step: int) -> "_Batch":
        """Let the model read the token [B] that was drawn in this step."""
        logits = model(
            input_ids=token.unsqueeze(1),
            attention_mask=self.attention[:, : self.width + step + 1],
            position_ids=self.lengths.unsqueeze(1) + step,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return self._replace(logits=logits)


def _read(
    model: PreTrainedModel, queries: Sequence[Sequence[int]], room: int, pad_token_id: int
) -> _Batch:
    """Let the model read each different query once, and line the rows up at its end."""
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(tuple(query), len(places)) for query in queries]
    prompt_of = torch.tensor(index, device=model.device)
    prompts = [*places]
    padded = pad_left(prompts, pad_token_id)
    width = padded.mask.shape[1]
    ids, mask = (part.to(model.device) for part in padded)
    attention = torch.ones(len(queries), width + room, dtype=torch.long, device=model.device)
    attention[:, :width] = mask[prompt_of]
    read = int(mask.sum())
    if take_packed(model):
        cache, logits = _read_packed(model, ids, mask, prompt_of)
    else:
        read = mask.numel()
        cache = DynamicCache(config=model.config)
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.reorder_cache(prompt_of)
    return _Batch(cache, logits[prompt_of], attention, mask.sum(1)[prompt_of], width, read)


def _read_packed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt_of: Tensor
) -> tuple[Cache, Tensor]:
    """Read left-padded prompts [P, Q] without their padding.

    Returns:
        The cache of the rows `prompt_of` [B], and logits [P, V].
    """
    width = mask.shape[1]
    cache: Cache | None = None
    last: list[Tensor] = []
    order: list[int] = []
    for group in micro_batches(mask.sum(1).tolist(), PREFILL_TOKENS, packed=True):
        part = mask[group]
        lengths = part.sum(1)
        ends = lengths.cumsum(0)
        seen = DynamicCache(config=model.config)
        logits = model(
            input_ids=ids[group][part].unsqueeze(0),
            attention_mask=lengths_as_mask(lengths),
            position_ids=position_ids(part)[part].unsqueeze(0),
            past_key_values=seen,
            use_cache=True,
            logits_to_keep=ends - 1,
        ).logits
        last.append(logits.squeeze(0))
        order += group
        # Each token of each row: where it stands in the pack, and where it belongs.
        starts = torch.zeros_like(mask[:, 0], dtype=torch.long)
        starts[group] = ends - width
        rows = torch.isin(prompt_of, torch.tensor(group, device=ids.device)).nonzero().squeeze(1)
        place, column = mask[prompt_of[rows]].nonzero(as_tuple=True)
        row = rows[place]
        token = starts[prompt_of[row]] + column
        if cache is None:
            cache = Cache(layers=[RoomyLayer(len(prompt_of), width) for _ in seen.layers])
        for layer, packed in zip(cache.layers, seen.layers, strict=True):
            layer.put(packed, token, row, column)
    assert cache is not None
    back = torch.tensor(order, device=ids.device).argsort()
    return cache, torch.cat(last)[back]


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting the distribution function; also its log-probability.

    Args:
        logits: [B, V].
        temperature: divides them.
        uniform: float64 [B], in [0, 1).
    """
    scaled = widen(logits)
    p = (scaled if temperature == 1 else scaled / temperature).softmax(-1)
    # First a part of the vocabulary, then a token of it: a running sum over all of it would take
    # longer than all the rest. In float64: in float32 tokens of less than 1e-7 were never drawn.
    size, whole = p.shape[1], p.shape[1] // PART * PART
    shares = torch.cat(
        [
            p[:, :whole].view(len(p), -1, PART).sum(-1, dtype=torch.float64),
            p[:, whole:].sum(-1, keepdim=True, dtype=torch.float64),
        ],
        1,
    )
    upto = shares.cumsum(1)
    number = uniform.unsqueeze(1) * upto[:, -1:]
    part = torch.searchsorted(upto, number, right=True).clamp(max=upto.shape[1] - 1)
    number = number - (upto - shares).gather(1, part)
    columns = part * PART + torch.arange(PART, device=p.device)
    inside = p.gather(1, columns.clamp(max=size - 1)).double().masked_fill_(columns >= size, 0)
    place = torch.searchsorted(inside.cumsum(1), number, right=True).clamp(max=PART - 1)
    token = columns.gather(1, place).clamp(max=size - 1)
    return token.squeeze(1), p.gather(1, token).squeeze(1).log().float()
