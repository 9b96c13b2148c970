"""Attention among sequences that stand one behind the other, each to itself, without padding."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from plumbline.ops.attention import blocks_of, causal_attention

NAME = "packed_sdpa"
"""Of torch's attention that takes packed sequences, too."""
ONE_BLOCK = 256
"""Tokens of a sequence, or of a pair, whose scores are made at once on a CPU."""


def take_packed(model: nn.Module) -> bool:
    """Let a model take packed sequences, from now on, and return whether it can.

    It can where each of its layers looks at all earlier tokens, and asks transformers for its
    attention. Sliding windows and recurrent layers would need to know where a sequence begins.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    layers, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if set(layers) != {"full_attention"}:
        return False
    model.set_attn_implementation(NAME)
    return True


def lengths_as_mask(lengths: Tensor, shared: Tensor | None = None) -> Tensor:
    """The lengths of packed sequences as an attention mask: int64 [1, 1, 2, B], on the CPU.

    transformers hands a mask of four dimensions to the attention as it is.

    Args:
        lengths: [B], of the sequences, as they stand there; at least 1 each.
        shared: [B], tokens that a sequence begins with and that stand at the start of the last
            whole sequence before it; 0, or none, where all are whole.
    """
    shared = torch.zeros_like(lengths) if shared is None else shared
    return torch.stack([lengths, shared]).cpu()[None, None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's attention; with lengths as its mask, of each packed sequence to itself.

    What it shares with the one before it belongs to it, too.

    Args:
        module: the layer.
        query, key, value: [B, heads, T, head], or [1, heads, N, head] of packed sequences.
        attention_mask: as for `sdpa`, or `lengths_as_mask`.
        options: as for `sdpa`.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths, shared = attention_mask[0, 0].tolist()
    blocks = blocks_of(lengths, shared)
    if query.device.type == "cpu" and max(block.length for block in blocks) <= ONE_BLOCK:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        mixed = causal_attention(query[0], key[0], value[0], blocks, scale)
        return mixed.transpose(0, 1).unsqueeze(0).contiguous(), None
    alone = (torch.split(states, lengths, dim=2) for states in (query, key, value))
    outputs = []
    whole: tuple[Tensor, Tensor] | None = None
    for q, k, v, taken in zip(*alone, shared, strict=True):
        earlier = None
        if not taken:
            whole = k, v
        else:
            assert whole is not None
            k, v = (
                torch.cat([start[:, :, :taken], own], 2)
                for start, own in zip(whole, (k, v), strict=True)
            )
            earlier = _earlier(q.shape[2], k.shape[2], q.device)
        settings = {**options, "is_causal": earlier is None}
        outputs.append(sdpa_attention_forward(module, q, k, v, earlier, **settings)[0])
    return torch.cat(outputs, 1), None


def _earlier(queries: int, keys: int, device: torch.device) -> Tensor:
    """What the last tokens of a sequence see of it: bool [1, 1, queries, keys]."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen.tril(keys - queries)[None, None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
