"""The loss of supervised fine-tuning."""

from torch import Tensor

IGNORE = -100
"""Label of a token that does not count, the value that transformers uses too."""


def sft_loss(logprobs: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Mean cross-entropy of the counted tokens, in nats a token.

    L = -1/N * sum_t log p(token_t | tokens before t).

    Args:
        logprobs: [n], of the counted tokens of this micro-batch, nats.
        num_tokens: N, the counted tokens of the whole mini-batch.
    """
    return -logprobs.sum() / num_tokens
