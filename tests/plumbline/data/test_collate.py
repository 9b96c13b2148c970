"""Padding, masks from lengths, positions and SFT labels, against hand values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.data.collate import pad_left, pad_right, position_ids, sft_batch

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

EOS = 9


@pytest.mark.parametrize("pad", [0, EOS])
def test_responses_are_padded_at_the_right(pad: int) -> None:
    ids, mask = pad_right([[5, EOS], [6, 7, 8, EOS], [EOS]], pad)
    assert ids.tolist() == [[5, EOS, pad, pad], [6, 7, 8, EOS], [EOS, pad, pad, pad]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("pad", [0, EOS])
def test_queries_are_padded_at_the_left(pad: int) -> None:
    ids, mask = pad_left([[5, EOS, 4], [6]], pad)
    assert ids.tolist() == [[5, EOS, 4], [pad, pad, 6]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_token_equal_to_the_pad_counts() -> None:
    assert pad_right([[0, 0], [0, 3, 0]], 0).mask.tolist() == [[1, 1, 0], [1, 1, 1]]


@repeatable
@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=4))
def test_the_mask_picks_the_sequences_out(sequences: list[list[int]]) -> None:
    for padded in (pad_left(sequences, 0), pad_right(sequences, 0)):
        kept = [ids[mask].tolist() for ids, mask in zip(*padded, strict=True)]
        assert kept == sequences


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    expected = [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert position_ids(mask).tolist() == expected


@pytest.mark.parametrize("pad", [0, EOS])
def test_labels_are_the_response_and_its_end(pad: int) -> None:
    batch = sft_batch([[1, 2, 3], [4]], [[5, EOS], [6, EOS]], pad)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, EOS], [4, 6, EOS, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 5, EOS], [-100, 6, EOS, -100, -100]]


def test_the_prompt_counts_where_asked_but_for_its_first_token() -> None:
    batch = sft_batch([[1, 2, 3], [4]], [[5, EOS], [6, EOS]], 0, train_on_prompt=True)
    assert batch["labels"].tolist() == [[-100, 2, 3, 5, EOS], [-100, 6, EOS, -100, -100]]


def test_an_end_token_within_the_prompt_does_not_count() -> None:
    batch = sft_batch([[3, EOS, 4]], [[5, EOS]], EOS)
    assert batch["labels"].tolist() == [[-100, -100, -100, 5, EOS]]


def test_a_prompt_without_a_response_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        sft_batch([[1], [2]], [[3]], 0)
