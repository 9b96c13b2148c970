"""Causal attention of packed sequences, each to itself, on a CPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plumbline.ops.logprobs import widen


class Block(NamedTuple):
    """A sequence, and behind it the rest of those that begin as it does."""

    start: int
    end: int
    hidden: tuple[tuple[slice, slice], ...] = ()
    """Tokens of the block and tokens before them that belong to another sequence."""

    @property
    def place(self) -> slice:
        """Where the block stands."""
        return slice(self.start, self.end)

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.end - self.start


def blocks_of(lengths: Sequence[int], shared: Sequence[int]) -> list[Block]:
    """Packed sequences as blocks, each with its own attention.

    Args:
        lengths: of the sequences, as they stand there.
        shared: how many tokens each of them begins with that stand at the start of the last
            sequence before it that stands there whole. 0: it stands there whole.
    """
    blocks: list[Block] = []
    here = 0
    for length, taken in zip(lengths, shared, strict=True):
        if taken:
            start, _, hidden = blocks.pop()
            own = slice(here - start, here - start + length)
            hidden = (*hidden, (own, slice(taken, own.start)))
        else:
            start, hidden = here, ()
        here += length
        blocks.append(Block(start, here, hidden))
    return blocks


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float
) -> Tensor:
    """softmax(scale * q k^T) v, in which a token sees itself and those before it in its sequence.

    For blocks of some hundred tokens at most: the probabilities are kept for the gradient. On a
    CPU torch's own attention takes twice as long on them in bf16, and most of it for the gradient.

    Args:
        query: [heads, N, D], the blocks one behind the other.
        key: [groups, N, D]; a group of heads shares its keys and values.
        value: [groups, N, E].
        blocks: `blocks_of` the sequences.
        scale: of the scores.

    Returns:
        [heads, N, E], of the values' dtype. Scores and probabilities are in float32 or wider.
    """
    mixed: Tensor = _CausalAttention.apply(query, key, value, tuple(blocks), scale)  # type: ignore[no-untyped-call]
    return mixed


class _CausalAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        scale: float,
    ) -> Tensor:
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
        longest = max(block.length for block in blocks)
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
        kept = []
        with torch.autocast(query.device.type, enabled=False):
            # A pair is one block, not two products: oneDNN compiles each new shape in bf16.
            for block in blocks:
                place, length = block.place, block.length
                q, k = widen(_folded(query, key, place)), widen(key[:, place])
                scores = torch.bmm(q * scale, k.mT)
                heads = scores.view(len(key), -1, length, length)
                heads.masked_fill_(later[:length, :length], -torch.inf)
                for tokens, others in block.hidden:
                    heads[:, :, tokens, others] = -torch.inf
                p = scores.softmax(-1).to(value.dtype)
                _fold_back(torch.bmm(p, value[:, place]), output, place)
                kept.append(p)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
        # What the softmax takes off: sum_j p_j dL/dp_j, which is the output times its gradient.
        shift = (widen(by_output) * widen(output)).sum(-1, keepdim=True).to(value.dtype)
        narrow_query, narrow_key = query.to(value.dtype), key.to(value.dtype)
        with torch.autocast(query.device.type, enabled=False):
            for block, p in zip(ctx.blocks, kept, strict=True):
                place = block.place
                by_o = _folded(by_output, key, place)
                by_value[:, place] = torch.bmm(p.mT, by_o)
                by_p = torch.bmm(by_o, value[:, place].mT)
                by_scores = by_p.sub_(_folded(shift, key, place)).mul_(p).mul_(ctx.scale)
                _fold_back(torch.bmm(by_scores, narrow_key[:, place]), by_query, place)
                by_key[:, place] = torch.bmm(by_scores.mT, _folded(narrow_query, key, place))
        return by_query, by_key, by_value, None, None


def _folded(states: Tensor, key: Tensor, place: slice) -> Tensor:
    """A block's part of [heads, N, D], heads of one group below each other: [groups, _, D]."""
    return states[:, place].reshape(len(key), -1, states.shape[2])


def _fold_back(part: Tensor, states: Tensor, place: slice) -> None:
    states[:, place] = part.view(len(states), -1, states.shape[2])
