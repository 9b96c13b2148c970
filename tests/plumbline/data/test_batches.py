"""Micro-batches by tokens."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.data.batches import micro_batches

LENGTHS = [3, 9, 1, 4, 4, 2]


@pytest.mark.parametrize(
    ("max_tokens", "packed", "expected"),
    [
        (23, True, [[1, 3, 4, 0, 5, 2]]),
        (13, True, [[1, 3], [4, 0, 5, 2]]),
        # Two in any case, of 13 and 10, where as full as can be they would have 22 and 1.
        (22, True, [[1, 3], [4, 0, 5, 2]]),
        # Padded to 9 and to 4: 1 x 9, 3 x 4, 2 x 2.
        (13, False, [[1], [3, 4, 0], [5, 2]]),
        # A row is never split.
        (1, True, [[1], [3], [4], [0], [5], [2]]),
    ],
)
def test_groups_by_hand(max_tokens: int, packed: bool, expected: list[list[int]]) -> None:
    assert micro_batches(LENGTHS, max_tokens, packed=packed) == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.booleans())
@settings(derandomize=True, database=None, deadline=None, max_examples=100)
def test_each_row_stands_in_one_group_within_the_limit(
    lengths: list[int], max_tokens: int, packed: bool
) -> None:
    groups = micro_batches(lengths, max_tokens, packed=packed)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        widths = [lengths[place] for place in group]
        taken = sum(widths) if packed else len(widths) * max(widths)
        assert taken <= max_tokens or len(group) == 1
    # Like lengths stand together.
    order = [lengths[place] for group in groups for place in group]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=10), st.integers(30, 90))
@settings(derandomize=True, database=None, deadline=None, max_examples=100)
def test_packed_groups_are_as_few_and_then_as_small_as_can_be(
    lengths: list[int], max_tokens: int
) -> None:
    order = sorted(lengths, reverse=True)
    sums = []
    for cuts in product([False, True], repeat=len(order) - 1):
        ends = [place for place, cut in enumerate(cuts, 1) if cut]
        groups = [order[a:b] for a, b in pairwise([0, *ends, len(order)])]
        sums.append([sum(group) for group in groups])
    allowed = [each for each in sums if max(each) <= max_tokens]
    fewest = min(map(len, allowed))

    mine = micro_batches(lengths, max_tokens, packed=True)

    assert len(mine) == fewest
    largest = max(sum(lengths[place] for place in group) for group in mine)
    assert largest == min(max(each) for each in allowed if len(each) == fewest)
