"""Hidden states of real tokens, and what a language model says from them."""

from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from plumbline.data.collate import position_ids
from plumbline.models.packed_attention import lengths_as_mask, take_packed
from plumbline.ops.linear_logprobs import TokenStats, linear_logprobs
from plumbline.ops.logprobs import entropy, token_logprobs
from plumbline.ops.shapes import product_dtype, size_multiple

WHOLE_BYTES = 2**28
"""Of logits that exist at a time where a model makes them itself: each time costs a token's way
through all of its layers, twice."""


class HeadStates(NamedTuple):
    """What stands before a language model's head."""

    hidden: Tensor
    """[N, H], the hidden states as the head gets them."""
    is_linear: bool
    """The logits are what the head, a linear layer, makes of them, and nothing else."""


def last_states(
    backbone: PreTrainedModel, ids: Tensor, mask: Tensor, *, pairs: bool = False
) -> Tensor:
    """The last hidden state of each real token: ids and bool mask [B, T] to [N, H].

    The tokens stand row by row; N counts the True of the mask. Where the model takes packed
    sequences, padding costs nothing; and what both rows of a pair begin with is computed once.

    Args:
        backbone: a model without its head.
        ids: int64 [B, T].
        mask: bool [B, T], True = a token of the sequence.
        pairs: rows 2i and 2i + 1 are a pair, and may begin with the same tokens. They share these
            where both stand at the left of `ids`.
    """
    inputs, places = _inputs(backbone, ids, mask, pairs=pairs)
    hidden = backbone(**inputs).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, places)


def states_before(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, targets: Tensor, *, pairs: bool = False
) -> HeadStates:
    """Run a language model up to its head, and keep what predicts the targets.

    Args:
        model: a causal language model.
        ids: int64 [B, T].
        mask: bool [B, T], True = a token of the sequence.
        targets: bool [B, T], True = a token to predict; never the first one of a sequence.
        pairs: as for `last_states`.
    """
    inputs, places = _inputs(model, ids, mask, pairs=pairs)
    head = model.get_output_embeddings()
    before: list[Tensor] = []
    after: list[Tensor] = []

    with ExitStack() as undone, ExitStack() as wide:

        def keep(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor]:
            before.append(states[0])
            # The model itself goes on with the logits of no token, for which autocast need not
            # narrow the head's weights.
            wide.enter_context(torch.autocast(ids.device.type, enabled=False))
            return (states[0][:, :0].to(head.weight.dtype),)

        def note(_: nn.Module, __: Any, logits: Tensor) -> None:
            wide.close()
            after.append(logits)

        # Models differ in what they do before and after, but all feed this layer what it makes
        # logits of.
        undone.callback(head.register_forward_pre_hook(keep).remove)
        undone.callback(head.register_forward_hook(note).remove)
        logits = model(**inputs).logits
    # Each token is predicted from the one before it.
    places = places[targets[mask].nonzero().squeeze(1) - 1]
    hidden = before[0].flatten(0, 1).index_select(0, places)
    return HeadStates(hidden, type(head) is nn.Linear and logits is after[0])


def token_stats(
    model: PreTrainedModel, states: HeadStates, tokens: Tensor, temperature: float = 1.0
) -> TokenStats:
    """Log-probability of each token and entropy of its distribution, from the states before it.

    Args:
        model: the language model that the states are from.
        states: of N tokens.
        tokens: int64 [N].
        temperature: divides the logits.
    """
    head = model.get_output_embeddings()
    if states.is_linear:
        return linear_logprobs(states.hidden, head.weight, head.bias, tokens, temperature)

    def stats(hidden: Tensor, chosen: Tensor) -> TokenStats:
        logits = _logits(model, hidden)
        return TokenStats(token_logprobs(logits, chosen, temperature), entropy(logits, temperature))

    rows = max(1, WHOLE_BYTES // (4 * len(head.weight)))
    parts = [
        checkpoint(stats, *part, use_reentrant=False)
        for part in zip(torch.split(states.hidden, rows), torch.split(tokens, rows), strict=True)
    ]
    return TokenStats(*map(torch.cat, zip(*parts, strict=True)))


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's own logits of hidden states, whatever it does to them: [N, H] to [N, V].

    It runs on one token, in place of whose state its head gets these.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: (hidden.unsqueeze(0),))
    token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    try:
        logits: Tensor = model(input_ids=token, use_cache=False).logits.squeeze(0)
    finally:
        hook.remove()
    return logits


def _inputs(
    model: nn.Module, ids: Tensor, mask: Tensor, *, pairs: bool
) -> tuple[dict[str, Any], Tensor]:
    """What the model takes for the sequences, and where it leaves the state of each real token.

    The places [N] count the states [_, _, H] of the model one by one.
    """
    positions = position_ids(mask)
    if not take_packed(model):
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "position_ids": positions,
            "use_cache": False,
        }
        return inputs, mask.flatten().nonzero().squeeze(1)
    shared = _shared(ids, mask) if pairs else torch.zeros_like(mask[:, 0], dtype=torch.long)
    own = mask & (positions >= shared.unsqueeze(1))
    lengths = own.sum(1)
    # A sequence with which another one begins has nothing of its own.
    kept = lengths > 0
    places = own.flatten().cumsum(0).view_as(ids) - 1
    if pairs:
        places[1::2] = torch.where(own[1::2], places[1::2], places[::2])
    pack = _Pack(ids[own], positions[own], lengths[kept], shared[kept])
    dtype = product_dtype(ids.device, next(model.parameters()).dtype)
    return pack.filled(size_multiple(ids.device, dtype)).inputs(), places[mask]


class _Pack(NamedTuple):
    """Sequences one behind the other."""

    ids: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N], of each token in its sequence."""
    lengths: Tensor
    """int64 [B]."""
    shared: Tensor
    """int64 [B], tokens that a sequence takes from the one before it."""

    def filled(self, multiple: int) -> Self:
        """With one more sequence, of which nobody asks anything, for a multiple of N."""
        missing = -len(self.ids) % multiple
        if not missing:
            return self
        lengths = self.lengths.new_tensor([missing])
        return type(self)(
            nn.functional.pad(self.ids, (0, missing)),
            # All at the first place, for a model's context may be shorter than what is missing.
            nn.functional.pad(self.positions, (0, missing)),
            torch.cat([self.lengths, lengths]),
            nn.functional.pad(self.shared, (0, 1)),
        )

    def inputs(self) -> dict[str, Any]:
        """What a model takes."""
        return {
            "input_ids": self.ids.unsqueeze(0),
            "attention_mask": lengths_as_mask(self.lengths, self.shared),
            "position_ids": self.positions.unsqueeze(0),
            "use_cache": False,
        }


def _shared(ids: Tensor, mask: Tensor) -> Tensor:
    """How many tokens the second row of each pair begins with as the first one does, [B], else 0.

    Rows that don't begin in the first column share nothing.
    """
    alike = (ids[::2] == ids[1::2]) & mask[::2] & mask[1::2]
    count = alike.long().cumprod(1).sum(1)
    return torch.stack([torch.zeros_like(count), count], 1).flatten()
