"""Attention among sequences that stand one behind the other, each to itself, without padding."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any
from weakref import WeakSet

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
NEAR = 1e-2
"""How near a model's numbers of packed sequences are to those of each alone, in units of their
spread; what comes of a mask that was misread is as large as the spread."""
_padded: WeakSet[PreTrainedModel] = WeakSet()
"""Models that turned out not to take packed sequences."""


def take_packed(model: nn.Module) -> bool:
    """Let a model take packed sequences, from now on, and return whether it can.

    It can where each of its layers looks at all earlier tokens, and asks transformers for its
    attention; a few tokens show whether it then says of packed sequences what it says of each
    alone. Sliding windows and recurrent layers would need to know where a sequence begins.
    """
    if not isinstance(model, PreTrainedModel) or model in _padded:
        return False
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    layers, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if set(layers) != {"full_attention"}:
        return False
    alone = _try(model, packed=False)
    model.set_attn_implementation(NAME)
    try:
        works = torch.allclose(_try(model, packed=True), alone, rtol=NEAR, atol=NEAR)
    except Exception:
        # Some layer of it reads the mask by itself.
        works = False
    if not works:
        model.set_attn_implementation("sdpa")
        _padded.add(model)
    return works


@torch.no_grad()
def _try(model: PreTrainedModel, *, packed: bool) -> Tensor:
    """What a model makes of three tokens and of two: [5, _], in its own units of spread."""
    # A scalar model's head wants to know where sequences end.
    has_head = model.get_output_embeddings() is not None
    network = model if has_head else getattr(model, model.base_model_prefix, model)
    lengths = [3, 2]
    ids = torch.arange(sum(lengths), device=model.device) % model.config.vocab_size
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    packs = [lengths] if packed else [[n] for n in lengths]
    sizes = [sum(pack) for pack in packs]
    was_training = network.training
    network.eval()
    try:
        outputs = []
        with torch.autocast(model.device.type, enabled=False):
            for pack, own, places in zip(
                packs, torch.split(ids, sizes), torch.split(positions, sizes), strict=True
            ):
                mask = lengths_as_mask(torch.tensor(pack)) if packed else None
                output = network(
                    input_ids=own[None], position_ids=places[None], attention_mask=mask,
                    use_cache=False,
                )  # fmt: skip
                outputs.append(output.logits if has_head else output.last_hidden_state)
    finally:
        network.train(was_training)
    states = torch.cat(outputs, 1).squeeze(0).float()
    return states / states.std()


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
    outputs = []
    start = 0
    for one_block, own, taken in _runs(lengths, shared):
        place = slice(start, start + sum(own))
        start = place.stop
        q, k, v = query[:, :, place], key[:, :, place], value[:, :, place]
        if query.device.type == "cpu" and one_block:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            mixed = causal_attention(q[0], k[0], v[0], blocks_of(own, taken), scale)
            outputs.append(mixed.transpose(0, 1).unsqueeze(0))
        else:
            outputs += _one_by_one(module, q, k, v, own, taken, options)
    return torch.cat(outputs, 1), None


def _runs(
    lengths: Sequence[int], shared: Sequence[int]
) -> Iterator[tuple[bool, list[int], list[int]]]:
    """Sequences that stand behind each other and are alike in being short, or not.

    A sequence goes with those that share its beginning: what it is told by does not depend on who
    else is packed with it.
    """
    families: list[tuple[list[int], list[int]]] = []
    for length, taken in zip(lengths, shared, strict=True):
        if not taken:
            families.append(([], []))
        families[-1][0].append(length)
        families[-1][1].append(taken)
    for is_short, run in groupby(families, lambda family: sum(family[0]) <= ONE_BLOCK):
        own, taken_of = zip(*run, strict=True)
        yield is_short, [*chain(*own)], [*chain(*taken_of)]


def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    shared: Sequence[int],
    options: dict[str, Any],
) -> Iterator[Tensor]:
    """torch's attention of each sequence: [1, T, heads, head] each."""
    alone = (torch.split(states, [*lengths], dim=2) for states in (query, key, value))
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
        yield sdpa_attention_forward(module, q, k, v, earlier, **settings)[0]


def _earlier(queries: int, keys: int, device: torch.device) -> Tensor:
    """What the last tokens of a sequence see of it: bool [1, 1, queries, keys]."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen.tril(keys - queries)[None, None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
