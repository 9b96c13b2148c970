"""Log-probabilities of given tokens, and the entropy of the distribution they came from."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`, in nats.

    Args:
        logits: [..., V].
        tokens: int64 [...], the tokens that were drawn.
        temperature: the one the tokens were drawn with.

    Returns:
        [...], in float32 or wider, whatever the width of the logits.
    """
    scaled = widen(logits) / temperature
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(scaled, -1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), in nats: logits [..., V] to [...]."""
    logp = torch.log_softmax(widen(logits) / temperature, -1)
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, torch.zeros_like(logp))).sum(-1)


def widen(logits: Tensor) -> Tensor:
    """Half-precision logits lose whole nats in a sum over the vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()
