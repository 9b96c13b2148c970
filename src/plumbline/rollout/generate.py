"""Sampling responses from a policy, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from plumbline.data.collate import pad_left, position_ids


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
    update differentiates. Sampling stops when every response has ended.

    Args:
        model: a causal language model.
        queries: token ids, without padding.
        max_tokens: the longest response, its end token included.
        stop_token_ids: tokens that end a response, each its last one.
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
    device = model.device
    stops = torch.tensor(list(stop_token_ids), device=device)
    ids, mask = (part.to(device) for part in pad_left(queries, pad_token_id))
    positions = position_ids(mask)
    next_position = positions[:, -1:] + 1
    # The mask is written to in place of being grown, which would copy it at every token.
    attention = torch.ones(len(queries), ids.shape[1] + max_tokens, dtype=torch.long, device=device)
    attention[:, : ids.shape[1]] = mask
    cache = DynamicCache(config=model.config)
    running = torch.ones(len(queries), dtype=torch.bool, device=device)
    tokens, masks, logprobs = [], [], []
    step_ids = ids
    for step in range(max_tokens):
        logits = model(
            input_ids=step_ids,
            attention_mask=attention[:, : ids.shape[1] + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        every_logprob = torch.log_softmax(logits.float() / temperature, -1)
        token = torch.multinomial(every_logprob.exp(), 1, generator=generator)
        logprob = every_logprob.gather(1, token).squeeze(1)
        token = torch.where(running, token.squeeze(1), pad_token_id)
        tokens.append(token)
        masks.append(running)
        logprobs.append(torch.where(running, logprob, 0.0))
        running = running & ~torch.isin(token, stops)
        if not running.any():
            break
        step_ids = token.unsqueeze(1)
        positions = next_position + step
    return Responses(
        torch.stack(tokens, 1), torch.stack(masks, 1), ~running, torch.stack(logprobs, 1)
    )
