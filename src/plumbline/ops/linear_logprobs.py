"""Log-probabilities and entropies from hidden states, with the logits made block by block."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plumbline.ops.logprobs import widen

BLOCK_BYTES = 2**23
"""Of the logits that exist at a time: small beside the activations, large for a matrix product, and
less than what the C library gives back to the system (and has to ask for again) at each free."""


class TokenStats(NamedTuple):
    """What a language model says about given tokens; in float32 or wider."""

    logprobs: Tensor
    """[N], of the tokens, nats."""
    entropies: Tensor
    """[N], of the distributions that they come from, nats."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float = 1.0
) -> TokenStats:
    """log softmax(z) at `tokens` and its entropy, z = (hidden @ weight.T + bias) / temperature.

    All logits at once would take N x V numbers, and their gradient as many again. Here a block of
    the vocabulary is made at a time, in the forward pass and again in the backward pass, so that
    memory does not grow with V (Wijmans et al. 2024, arXiv 2411.09009, section 4, in plain torch).
    With H the entropy and p = softmax(z): d log p_a / dz_j = [j = a] - p_j and
    dH / dz_j = -p_j (log p_j + H).

    Args:
        hidden: [N, H], the last hidden states.
        weight: [V, H].
        bias: [V], or none.
        tokens: int64 [N].
        temperature: divides the logits.

    The matrix products are in autocast's width where it is on, sums and gradients of weights in
    that of the weights.
    """
    stats = _LinearLogprobs.apply(hidden, weight, bias, tokens, temperature)  # type: ignore[no-untyped-call]
    return TokenStats(*stats)


class _LinearLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        width = weight.dtype
        if torch.is_autocast_enabled(device):
            width = torch.get_autocast_dtype(device)
        narrow = hidden.to(width)
        wide = widen(hidden.new_empty(0)).dtype
        lse = torch.full(tokens.shape, -torch.inf, dtype=wide, device=hidden.device)
        entropy, chosen = torch.zeros_like(lse), torch.zeros_like(lse)
        with torch.autocast(device, enabled=False):
            for block in _blocks(len(weight), len(tokens)):
                z = _logits(narrow, weight, bias, block, temperature)
                column, inside = _column(tokens, block)
                chosen = torch.where(inside, z.gather(1, column).squeeze(1), chosen)
                top = z.amax(1)
                z -= top.unsqueeze(1)
                share = z.exp()
                total = share.sum(1)
                block_lse = top + total.log()
                block_entropy = total.log() - torch.linalg.vecdot(share, z) / total
                both = torch.logaddexp(lse, block_lse)
                before, here = (lse - both).exp(), (block_lse - both).exp()
                # The entropy of a choice between two parts, and of the choice inside of each.
                entropy = before * entropy - before.xlogy(before)
                entropy += here * block_entropy - here.xlogy(here)
                lse = both
        ctx.save_for_backward(narrow, weight, bias, tokens, lse, entropy)
        ctx.temperature, ctx.hidden_dtype = temperature, hidden.dtype
        ctx.set_materialize_grads(False)
        return chosen - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_logprobs: Tensor | None, by_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        narrow, weight, bias, tokens, lse, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if by_logprobs is None:
            by_logprobs = torch.zeros_like(lse)
        by_logprobs = by_logprobs / ctx.temperature
        grad_hidden = torch.zeros_like(narrow, dtype=lse.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(narrow.device.type, enabled=False):
            for block in _blocks(len(weight), len(tokens)):
                z = _logits(narrow, weight, bias, block, ctx.temperature)
                logp = z.sub_(lse.unsqueeze(1))
                factor = -by_logprobs.unsqueeze(1)
                if by_entropies is not None:
                    by_entropy = (by_entropies / ctx.temperature).unsqueeze(1)
                    factor = factor - by_entropy * (logp + entropy.unsqueeze(1))
                by_z = logp.exp_().mul_(factor)
                column, inside = _column(tokens, block)
                by_z.scatter_add_(1, column, torch.where(inside, by_logprobs, 0).unsqueeze(1))
                if grad_bias is not None:
                    grad_bias[block] = by_z.sum(0)
                by_z = by_z.to(narrow.dtype)
                if grad_hidden is not None:
                    grad_hidden += by_z @ weight[block].to(narrow.dtype)
                if grad_weight is not None:
                    grad_weight[block] = by_z.T @ narrow
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _blocks(vocabulary: int, tokens: int) -> Iterator[slice]:
    largest = max(1, BLOCK_BYTES // (4 * max(tokens, 1)))
    # As few, of like sizes, and these are even: odd ones take longer in bf16.
    size = -(-vocabulary // -(-vocabulary // largest))
    size += -size % 64
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, temperature: float
) -> Tensor:
    logits = widen(hidden @ weight[block].to(hidden.dtype).T)
    if bias is not None:
        logits += bias[block]
    return logits if temperature == 1 else logits.div_(temperature)


def _column(tokens: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where each token stands in the block, [N, 1], and whether it does, bool [N]."""
    column = tokens - block.start
    size = block.stop - block.start
    return column.clamp(0, size - 1).unsqueeze(1), (column >= 0) & (column < size)
