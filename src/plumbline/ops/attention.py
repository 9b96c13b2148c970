"""Causal attention of packed sequences, each to itself, on a CPU."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plumbline.ops.logprobs import widen
from plumbline.ops.shapes import size_multiple


class Block(NamedTuple):
    """A sequence, and behind it the rest of those that begin as it does."""

    start: int
    end: int
    hidden: tuple[tuple[slice, slice], ...] = ()
    """Tokens of the block and tokens before them that belong to another sequence."""

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
        layout = _Layout.of(blocks, size_multiple(value.device, value.dtype))
        query, key, value = (layout.spread(states) for states in (query, key, value))
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
        longest = max(group.length for group in layout.groups)
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
        kept = []
        with torch.autocast(query.device.type, enabled=False):
            for group in layout.groups:
                q, k = (widen(group.take(states, len(key))) for states in (query, key))
                scores = torch.bmm(q * scale, k.mT)
                group.hide(scores, later)
                p = scores.softmax(-1).to(value.dtype)
                group.put(torch.bmm(p, group.take(value, len(key))), output, len(key))
                kept.append(p)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.layout, ctx.scale = layout, scale
        return layout.gather(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        layout: _Layout = ctx.layout
        by_output = layout.spread(by_output)
        by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
        # What the softmax takes off: sum_j p_j dL/dp_j, which is the output times its gradient.
        shift = (widen(by_output) * widen(output)).sum(-1, keepdim=True).to(value.dtype)
        query, narrow_key = query.to(value.dtype), key.to(value.dtype)
        with torch.autocast(query.device.type, enabled=False):
            for group, p in zip(layout.groups, kept, strict=True):
                q, k, v, by_o, off = (
                    group.take(states, len(key))
                    for states in (query, narrow_key, value, by_output, shift)
                )
                group.put(torch.bmm(p.mT, by_o), by_value, len(key))
                by_scores = torch.bmm(by_o, v.mT).sub_(off).mul_(p).mul_(ctx.scale)
                group.put(torch.bmm(by_scores, k), by_query, len(key))
                group.put(torch.bmm(by_scores.mT, q), by_key, len(key))
        return *(layout.gather(states) for states in (by_query, by_key, by_value)), None, None


class _Group(NamedTuple):
    """Blocks of one length that stand one behind the other, and go into one product."""

    start: int
    length: int
    blocks: tuple[Block, ...]

    def take(self, states: Tensor, groups: int) -> Tensor:
        """The group's part of [heads, P, D], heads that share keys below each other.

        [groups * blocks, _, D].
        """
        part = self._part(states, groups).transpose(1, 2)
        return part.reshape(groups * len(self.blocks), -1, states.shape[2])

    def put(self, part: Tensor, states: Tensor, groups: int) -> None:
        """The reverse of `take`, into [heads, P, D]."""
        there = self._part(states, groups).transpose(1, 2)
        there.copy_(part.view(there.shape))

    def hide(self, scores: Tensor, later: Tensor) -> None:
        """Set to -inf, in place, what a token does not see: [groups * blocks, _, length]."""
        length = self.length
        scores.view(len(scores), -1, length, length).masked_fill_(
            later[:length, :length], -torch.inf
        )
        by_block = scores.view(-1, len(self.blocks), scores.shape[1] // length, length, length)
        for number, block in enumerate(self.blocks):
            for tokens, others in block.hidden:
                by_block[:, number, :, tokens, others] = -torch.inf

    def _part(self, states: Tensor, groups: int) -> Tensor:
        """[groups, heads that share keys, blocks, length, D], a view."""
        count = len(self.blocks)
        part = states[:, self.start : self.start + count * self.length]
        share = len(states) // groups
        return part.view(groups, share, count, self.length, states.shape[2])


class _Layout(NamedTuple):
    """Where tokens stand once blocks are made longer, so that more of them are of one length.

    What is added stands behind the tokens of a block, and none of these looks there.
    """

    groups: tuple[_Group, ...]
    places: Tensor | None
    """int64 [N], of the tokens among P; none where all are where they were."""

    @classmethod
    def of(cls, blocks: Sequence[Block], multiple: int) -> Self:
        """Blocks whose lengths are multiples of this."""
        groups: list[_Group] = []
        places, end = [], 0
        for length, run in groupby(blocks, lambda block: -(-block.length // multiple) * multiple):
            groups.append(_Group(end, length, tuple(run)))
            for block in groups[-1].blocks:
                places.append(torch.arange(end, end + block.length))
                end += length
        moved = end > sum(block.length for block in blocks)
        return cls(tuple(groups), torch.cat(places) if moved else None)

    def spread(self, states: Tensor) -> Tensor:
        """[heads, N, D] to [heads, P, D], 0 where there is no token."""
        if self.places is None:
            return states
        last = self.groups[-1]
        wide = states.new_zeros(
            len(states), last.start + len(last.blocks) * last.length, states.shape[2]
        )
        return wide.index_copy_(1, self.places, states)

    def gather(self, states: Tensor) -> Tensor:
        """The reverse of `spread`."""
        return states if self.places is None else states.index_select(1, self.places)
