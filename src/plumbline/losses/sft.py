"""The loss of supervised fine-tuning."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from plumbline.ops.logprobs import widen

IGNORE = -100
"""Label of a token that does not count, the value that transformers uses too."""


def sft_loss(logits: Tensor, labels: Tensor, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the counted tokens, in nats a token.

    L = -1/N * sum_t log p(token_t | tokens before t), over the labels that are not IGNORE.

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: int64 [B, T], the tokens themselves, IGNORE where a token does not count.
        num_tokens: N, where the mean goes over more than this micro-batch; none counts here.

    Raises:
        ValueError: no label counts and `num_tokens` is not given.
    """
    targets = labels[:, 1:]
    is_counted = targets != IGNORE
    counted = is_counted.sum() if num_tokens is None else num_tokens
    if counted == 0:
        raise ValueError("sft_loss: expected at least one counted label, got none")
    # Picked before the loss, whose gradient at an ignored NaN would be NaN.
    kept = widen(logits[:, :-1][is_counted])
    total = cross_entropy(kept, targets[is_counted], reduction="sum")
    return total / counted
