"""Token rewards: where the score lands, what the KL costs, and responses without an end."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.ops.rewards import penalise_missing_eos, token_rewards

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)


def double(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def test_replace_puts_the_constant_where_the_end_is_missing() -> None:
    scores = double([2.0, 3.0, -0.5])
    has_eos = torch.tensor([True, False, False])
    assert penalise_missing_eos(scores, has_eos, "replace", -1.0).tolist() == [2.0, -1.0, -1.0]


def test_subtract_takes_the_constant_off_where_the_end_is_missing() -> None:
    scores = double([2.0, 3.0, -0.5])
    has_eos = torch.tensor([True, False, False])
    # 3 - 1 = 2; -0.5 - 1 = -1.5
    assert penalise_missing_eos(scores, has_eos, "subtract", 1.0).tolist() == [2.0, 2.0, -1.5]


@pytest.mark.parametrize("treatment", ["replace", "subtract"])
def test_closed_responses_keep_their_scores(treatment: str) -> None:
    scores = double([2.0, -3.0])
    got = penalise_missing_eos(scores, torch.tensor([True, True]), treatment, 7.0)  # type: ignore[arg-type]
    assert torch.equal(got, scores)


@pytest.mark.parametrize("treatment", ["replace", "subtract"])
def test_the_scores_given_are_not_changed(treatment: str) -> None:
    scores = double([2.0, -3.0])
    penalise_missing_eos(scores, torch.tensor([False, False]), treatment, 7.0)  # type: ignore[arg-type]
    assert scores.tolist() == [2.0, -3.0]


def test_an_unknown_treatment_is_refused() -> None:
    with pytest.raises(ValueError, match="expected replace or subtract, got 'drop'"):
        penalise_missing_eos(double([0.0]), torch.tensor([True]), "drop", 1.0)  # type: ignore[arg-type]


def test_rewards_by_hand() -> None:
    # beta = 0.5: row 0 -0.5, -1, -1.5 + 10; row 1 -2 + 20, then padding; row 2 -0.5, -0.5 - 4.
    kl = double([[1, 2, 3], [4, 9, 9], [1, 1, 9]])
    got = token_rewards(double([10, 20, -4]), kl, mask_of([3, 1, 2], 3), 0.5)
    assert got.tolist() == [[-0.5, -1.0, 8.5], [18.0, 0.0, 0.0], [-0.5, -4.5, 0.0]]


def test_without_a_kl_penalty_the_score_stands_alone_at_the_last_real_token() -> None:
    kl = double([[1, 2, 3, 4], [1, 2, 3, 4]])
    got = token_rewards(double([7, 8]), kl, mask_of([4, 2], 4), 0.0)
    assert got.tolist() == [[0, 0, 0, 7], [0, 8, 0, 0]]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 2),
    st.integers(0, 2**16),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e9]),
)
@repeatable
def test_rewards_agree_with_a_loop_whatever_stands_in_the_padding(
    lengths: list[int], extra: int, seed: int, garbage: float
) -> None:
    width = max(lengths) + extra
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    kl = torch.randn(len(lengths), width, dtype=torch.float64, generator=generator)
    mask = mask_of(lengths, width)
    got = token_rewards(scores, kl.masked_fill(~mask, garbage), mask, 0.3).tolist()
    for row, length in enumerate(lengths):
        for t in range(width):
            expected = -0.3 * kl[row, t].item() if t < length else 0.0
            if t == length - 1:
                expected += scores[row].item()
            assert got[row][t] == pytest.approx(expected, rel=1e-14, abs=0)


def test_rewards_of_a_response_add_up_to_its_score_less_its_kl() -> None:
    kl = double([[1, 2, 3], [4, 9, 9]])
    got = token_rewards(double([10, 20]), kl, mask_of([3, 1], 3), 0.1)
    # 10 - 0.1 * (1 + 2 + 3) = 9.4; 20 - 0.1 * 4 = 19.6
    assert got.sum(1).tolist() == pytest.approx([9.4, 19.6], rel=1e-14)


def test_rewards_do_not_depend_on_batch_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, dtype=torch.float64, generator=generator)
    kl = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    mask, order = mask_of([4, 1, 2], 4), torch.tensor([2, 0, 1])
    shuffled = token_rewards(scores[order], kl[order], mask[order], 0.2)
    assert torch.equal(shuffled, token_rewards(scores, kl, mask, 0.2)[order])


def test_a_response_without_a_token_is_refused_by_row() -> None:
    with pytest.raises(ValueError, match="row 1"):
        token_rewards(double([1, 2]), double([[0, 0], [0, 0]]), mask_of([2, 0], 2), 0.1)


def test_the_kl_and_the_scores_given_are_not_changed() -> None:
    scores, kl = double([5.0]), double([[1.0, 2.0]])
    token_rewards(scores, kl, mask_of([1], 2), 0.5)
    assert scores.tolist() == [5.0]
    assert kl.tolist() == [[1.0, 2.0]]
