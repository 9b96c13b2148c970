"""Halves of the training rows: disjoint, complete, even, and blind to the split."""

import hashlib

import pytest

from plumbline.data.halves import JUDGE_HALF, REWARD_MODEL_HALF, half_of, take_half
from plumbline.data.splits import split_of
from plumbline.errors import DataError

COUNT = 4000
IDS = [hashlib.sha256(f"prompt {i}".encode()).hexdigest() for i in range(COUNT)]
# Each prompt has two or three pairs, which are not neighbours.
ROWS = [
    {"prompt_id": identity, "chosen": f"answer {i}"}
    for i, identity in enumerate([*IDS[:60], *IDS[:60], *IDS[:20]])
]
# Five standard deviations of a share of a half; the prompts are fixed, so this cannot flicker.
EVEN = 2.5 / COUNT**0.5


def test_the_halves_are_disjoint_and_complete() -> None:
    halves = [take_half(ROWS, half) for half in (REWARD_MODEL_HALF, JUDGE_HALF)]
    prompts = [{row["prompt_id"] for row in half} for half in halves]
    assert not prompts[0] & prompts[1]
    rows = [row["chosen"] for half in halves for row in half]
    assert sorted(rows) == sorted(row["chosen"] for row in ROWS)
    assert all(10 < len(half) < 130 for half in halves)


def test_rows_keep_their_order_and_columns() -> None:
    kept = take_half(iter(ROWS), 1)
    assert kept == [row for row in ROWS if row in kept]


def test_the_half_of_a_known_prompt_never_changes() -> None:
    # Stored results are found again by what they were trained on.
    assert [half_of(identity) for identity in IDS[:16]] == [
        1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0,
    ]  # fmt: skip


def test_more_rows_move_no_old_row() -> None:
    few = take_half(ROWS[:60], 0)
    assert take_half(ROWS, 0)[: len(few)] == few


def test_each_half_gets_half_of_the_prompts() -> None:
    assert sum(map(half_of, IDS)) / COUNT == pytest.approx(0.5, abs=EVEN)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_train_and_test_prompts_alike_are_halved(fraction: float) -> None:
    for split in ("train", "test"):
        inside = [identity for identity in IDS if split_of(identity, fraction) == split]
        share = sum(map(half_of, inside)) / len(inside)
        assert share == pytest.approx(0.5, abs=2.5 / len(inside) ** 0.5)


def test_rows_of_one_prompt_are_refused_with_a_way_out() -> None:
    rows = [row for row in ROWS if row["prompt_id"] == IDS[0]]
    other = JUDGE_HALF if half_of(IDS[0]) == REWARD_MODEL_HALF else REWARD_MODEL_HALF
    with pytest.raises(DataError, match=r"evaluate\.judge: expected .* got 3 rows"):
        take_half(rows, other)
