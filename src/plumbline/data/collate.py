"""Lists of token ids to padded tensors; every mask comes from lengths, never from the pad id."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plumbline.losses.sft import IGNORE


class Padded(NamedTuple):
    """A batch of sequences of different lengths."""

    ids: Tensor
    """int64 [B, T]."""
    mask: Tensor
    """bool [B, T], True = a token of the sequence."""


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Put the sequences at the left and fill up at the right."""
    return _pad(sequences, pad_id, at_left=False)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Put the sequences at the right and fill up at the left (queries, before sampling)."""
    return _pad(sequences, pad_id, at_left=True)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: cumsum(mask) - 1, at least 0; [B, T] to [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def sft_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    *,
    train_on_prompt: bool = False,
) -> dict[str, Tensor]:
    """Prompts and responses to `input_ids`, `attention_mask`, `labels`, all [B, T], right-padded.

    The labels are the tokens themselves where they count and IGNORE elsewhere: the response and
    its end token count, the prompt only if asked (but for its first token, which nothing predicts).
    """
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    ids, mask = pad_right(sequences, pad_id)
    starts = torch.tensor([1 if train_on_prompt else len(prompt) for prompt in prompts])
    counted = mask & (torch.arange(ids.shape[1]) >= starts.unsqueeze(1))
    labels = torch.where(counted, ids, torch.full_like(ids, IGNORE))
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, *, at_left: bool) -> Padded:
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if at_left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = True
    return Padded(ids, mask)
