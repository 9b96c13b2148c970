"""What the two responses of a pair have in common."""

from typing import Any

import pytest

from plumbline.data.pairs import computed_tokens, pair_lengths, pair_sequences, shared_tokens


def row(chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return {"prompt": [7, 8, 9], "chosen": chosen, "rejected": rejected}


def test_sequences_stand_row_by_row() -> None:
    rows = [row([5], [6, 6]), {"prompt": [], "chosen": [1], "rejected": [2]}]
    assert pair_sequences(rows) == [[7, 8, 9, 5], [7, 8, 9, 6, 6], [1], [2]]
    assert [*map(pair_lengths, rows)] == [[4, 5], [1, 1]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "more"),
    [([5, 6, 1], [5, 4, 1], 1), ([5], [6, 5], 0), ([5, 6], [5], 1), ([5], [5], 1), ([], [5], 0)],
)
def test_the_prompt_and_equal_beginnings_are_shared(
    chosen: list[int], rejected: list[int], more: int
) -> None:
    pair = row(chosen, rejected)
    assert shared_tokens(pair) == 3 + more
    both = 6 + len(chosen) + len(rejected)
    assert computed_tokens(pair, packed=True) == both - 3 - more
    assert computed_tokens(pair, packed=False) == 6 + 2 * max(len(chosen), len(rejected))
