"""Causal attention of packed sequences, each to itself, on a CPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plumbline.ops.logprobs import widen


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    shared: Sequence[int],
    scale: float,
) -> Tensor:
    """softmax(scale * q k^T) v, in which a token sees itself and those before it in its sequence.

    A sequence may begin as another one does: it then stands there without its beginning, whose
    keys and values its tokens see in the other one.

    For sequences of some hundred tokens at most: the probabilities are kept for the gradient. On a
    CPU torch's own attention takes twice as long on them in bf16, and most of it for the gradient.

    Args:
        query: [heads, N, D], the sequences one behind the other.
        key: [groups, N, D]; a group of heads shares its keys and values.
        value: [groups, N, E].
        lengths: of the sequences, as they stand there; at least 1 each, their sum is N.
        shared: how many tokens each of them begins with that stand at the start of the last
            sequence before it that stands there whole. 0: it stands there whole.
        scale: of the scores.

    Returns:
        [heads, N, E], of the values' dtype. Scores and probabilities are in float32 or wider.
    """
    mixed: Tensor = _CausalAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, tuple(lengths), tuple(shared), scale
    )
    return mixed


class _CausalAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        shared: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
        longest = max(own + taken for own, taken in zip(lengths, shared, strict=True))
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
        kept = []
        with torch.autocast(query.device.type, enabled=False):
            for place, start in _places(lengths, shared):
                q, k = _folded(widen(query), key, place), widen(_seen(key, place, start))
                scores = torch.bmm(q * scale, k.mT)
                length, end = place.stop - place.start, k.shape[1]
                heads = scores.view(len(key), -1, length, end)
                heads.masked_fill_(later[end - length : end, :end], -torch.inf)
                p = scores.softmax(-1).to(value.dtype)
                _fold_back(torch.bmm(p, _seen(value, place, start)), output, place)
                kept.append(p)
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.lengths, ctx.shared, ctx.scale = lengths, shared, scale
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
            places = _places(ctx.lengths, ctx.shared)
            for (place, start), p in zip(places, kept, strict=True):
                by_o = _folded(by_output, key, place)
                _give(torch.bmm(p.mT, by_o), by_value, place, start)
                by_p = torch.bmm(by_o, _seen(value, place, start).mT)
                by_scores = by_p.sub_(_folded(shift, key, place)).mul_(p).mul_(ctx.scale)
                _fold_back(torch.bmm(by_scores, _seen(narrow_key, place, start)), by_query, place)
                by_k = torch.bmm(by_scores.mT, _folded(narrow_query, key, place))
                _give(by_k, by_key, place, start)
        return by_query, by_key, by_value, None, None, None


def _places(lengths: Sequence[int], shared: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Where each sequence stands, and where its beginning does; that is empty where it is whole."""
    here = whole = 0
    for length, taken in zip(lengths, shared, strict=True):
        if not taken:
            whole = here
        yield slice(here, here + length), slice(whole, whole + taken)
        here += length


def _seen(states: Tensor, place: slice, start: slice) -> Tensor:
    """What a sequence sees of [groups, N, D]."""
    if start.start == start.stop:
        return states[:, place]
    return torch.cat([states[:, start], states[:, place]], 1)


def _give(part: Tensor, states: Tensor, place: slice, start: slice) -> None:
    """Put the gradient of what a sequence sees in its place; others may have given its beginning.

    A beginning belongs to a sequence that comes before, and has its own gradient already.
    """
    taken = start.stop - start.start
    states[:, place] = part[:, taken:]
    if taken:
        states[:, start] += part[:, :taken]


def _folded(states: Tensor, key: Tensor, place: slice) -> Tensor:
    """A sequence's part of [heads, N, D], heads of one group below each other: [groups, _, D]."""
    return states[:, place].reshape(len(key), -1, states.shape[2])


def _fold_back(part: Tensor, states: Tensor, place: slice) -> None:
    states[:, place] = part.view(len(states), -1, states.shape[2])
