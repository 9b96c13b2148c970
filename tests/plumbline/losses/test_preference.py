"""The losses of the reward model against hand values and a plain sigmoid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.losses.preference import pairwise_loss, pointwise_loss

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

scores = st.floats(-20, 20)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_pairwise(
    pairs: list[tuple[float, float]], margins: list[float], centering: float
) -> list[float]:
    """The loss of each pair."""
    losses = []
    for (chosen, rejected), margin in zip(pairs, margins, strict=True):
        sigmoid = 1 / (1 + math.exp(-(chosen - rejected - margin)))
        losses.append(-math.log(sigmoid) + centering * (chosen + rejected) ** 2)
    return losses


def test_equal_scores_cost_log_two() -> None:
    # -log sigmoid(0) = -log 1/2
    loss, _ = pairwise_loss(double(1.5), double(1.5))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)


def test_loss_by_hand() -> None:
    # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4: mean of log 4/3 and log 4.
    loss, _ = pairwise_loss(double(math.log(3) + 2, 0), double(2, math.log(3)))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-14)


def test_the_margin_is_taken_off_the_difference() -> None:
    # The scores differ by 1 + log 3; less a margin of 1 that is log 3.
    chosen, rejected = double(1 + math.log(3)), double(0)
    for margin in (1.0, double(1.0)):
        loss, _ = pairwise_loss(chosen, rejected, margin)
        assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_each_pair_has_its_own_margin() -> None:
    # log 3 - 0, and 5 + log 3 - 5.
    loss, _ = pairwise_loss(double(math.log(3), 5 + math.log(3)), double(0, 0), double(0, 5))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_centring_by_hand() -> None:
    # Pair 1: log 2 + 0.1 * (3 + 3)^2 = log 2 + 3.6; pair 2: log 2 + 0.1 * (-1 - 1)^2 = log 2 + 0.4.
    loss, _ = pairwise_loss(double(3, -1), double(3, -1), centering=0.1)
    assert loss.item() == pytest.approx(math.log(2) + 2.0, rel=1e-14)


def test_centring_costs_nothing_where_scores_sum_to_zero() -> None:
    plain, _ = pairwise_loss(double(2, -1), double(-2, 1))
    centred, _ = pairwise_loss(double(2, -1), double(-2, 1), centering=10.0)
    assert centred.item() == plain.item()


def test_without_centring_a_shift_of_all_scores_has_no_effect() -> None:
    loss, _ = pairwise_loss(double(2, -1), double(1, 3))
    shifted, _ = pairwise_loss(double(66, 63), double(65, 67))
    assert shifted.item() == loss.item()


@given(
    st.lists(st.tuples(scores, scores, st.floats(0, 3)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.01, 1.0]),
)
@repeatable
def test_loss_agrees_with_a_plain_sigmoid(
    triples: list[tuple[float, float, float]], centering: float
) -> None:
    pairs = [(chosen, rejected) for chosen, rejected, _ in triples]
    margins = [margin for _, _, margin in triples]
    terms = naive_pairwise(pairs, margins, centering)
    loss, stats = pairwise_loss(
        double(*(chosen for chosen, _ in pairs)),
        double(*(rejected for _, rejected in pairs)),
        double(*margins),
        centering,
    )
    assert loss.item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-11, abs=1e-13)
    right = sum(chosen > rejected for chosen, rejected in pairs)
    assert stats.accuracy.item() == pytest.approx(right / len(pairs), rel=1e-6)
    differences = math.fsum(chosen - rejected for chosen, rejected in pairs)
    assert stats.margin.item() == pytest.approx(differences / len(pairs), rel=1e-11, abs=1e-13)


def test_statistics_by_hand() -> None:
    # Right, wrong, a tie (which is not right), right; the margin asked for does not count.
    _, stats = pairwise_loss(double(3, 0, 1, 2), double(1, 2, 1, 1), margin=1.5, centering=1.0)
    assert stats.accuracy.item() == 0.5
    assert stats.margin.item() == 0.25  # (2 - 2 + 0 + 1) / 4


def test_statistics_carry_no_gradient() -> None:
    _, stats = pairwise_loss(double(1.0).requires_grad_(), double(0.0).requires_grad_())
    assert not any(value.requires_grad for value in stats)


@pytest.mark.parametrize(("difference", "expected"), [(-1000.0, 1000.0), (1000.0, 0.0)])
def test_far_apart_scores_do_not_overflow(difference: float, expected: float) -> None:
    chosen = double(difference).requires_grad_()
    loss, _ = pairwise_loss(chosen, double(0))
    assert loss.item() == expected
    assert torch.autograd.grad(loss, chosen)[0].isfinite().all()


def test_gradient_by_hand() -> None:
    # dL/dr_c = -(1 - sigmoid(d)) / B and dL/dr_r is its opposite; sigmoid(log 3) = 3/4, B = 2.
    chosen = double(math.log(3), 0).requires_grad_()
    rejected = double(0, 0).requires_grad_()
    loss, _ = pairwise_loss(chosen, rejected)
    for_chosen, for_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert for_chosen.tolist() == pytest.approx([-1 / 8, -1 / 4], rel=1e-14)
    assert for_rejected.tolist() == pytest.approx([1 / 8, 1 / 4], rel=1e-14)


@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_gradcheck(centering: float) -> None:
    chosen = double(1.0, -0.5, 2.0).requires_grad_()
    rejected = double(0.3, 0.4, 2.0).requires_grad_()
    margin = double(0.0, 0.5, 1.0)
    assert torch.autograd.gradcheck(
        lambda c, r: pairwise_loss(c, r, margin, centering)[0], (chosen, rejected)
    )


def test_batch_order_has_no_effect() -> None:
    chosen, rejected = double(1.0, -0.5, 2.0).requires_grad_(), double(0.3, 0.4, -2.0)
    margin, order = double(0.0, 0.5, 1.0), torch.tensor([2, 0, 1])
    straight, _ = pairwise_loss(chosen, rejected, margin, 0.1)
    shuffled, _ = pairwise_loss(chosen[order], rejected[order], margin[order], 0.1)
    torch.testing.assert_close(shuffled, straight, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(shuffled, chosen)[0],
        torch.autograd.grad(straight, chosen)[0],
        rtol=1e-14,
        atol=0,
    )


def test_micro_batches_weighted_by_their_pairs_add_up_to_the_whole() -> None:
    chosen, rejected = double(1.0, -0.5, 2.0).requires_grad_(), double(0.3, 0.4, -2.0)
    whole, _ = pairwise_loss(chosen, rejected, centering=0.1)
    one, _ = pairwise_loss(chosen[:1], rejected[:1], centering=0.1)
    two, _ = pairwise_loss(chosen[1:], rejected[1:], centering=0.1)
    split = (one + 2 * two) / 3
    torch.testing.assert_close(split, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(split, chosen)[0],
        torch.autograd.grad(whole, chosen)[0],
        rtol=1e-14,
        atol=0,
    )


def naive_pointwise(scores: list[float], labels: list[bool]) -> list[float]:
    """Minus the log of the probability that sigmoid(score) gives to each label."""
    good = [1 / (1 + math.exp(-score)) for score in scores]
    return [-math.log(p if label else 1 - p) for p, label in zip(good, labels, strict=True)]


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)


def test_a_score_of_0_costs_log_two_whatever_the_label() -> None:
    loss, _ = pointwise_loss(double(0, 0), flags(True, False))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)


def test_pointwise_loss_by_hand() -> None:
    # sigmoid(log 3) = 3/4: the good response costs log 4/3, the bad one with that score log 4,
    # the bad one that scores log 1/4 has sigmoid 1/5 and costs log 5/4.
    scores = double(math.log(3), math.log(3), math.log(1 / 4))
    loss, _ = pointwise_loss(scores, flags(True, False, False))
    expected = (math.log(4 / 3) + math.log(4) + math.log(5 / 4)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-14)


# Near 1 the oracle's 1 - p has no digits left.
@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=1, max_size=6))
@repeatable
def test_pointwise_loss_agrees_with_a_plain_sigmoid(rows: list[tuple[float, bool]]) -> None:
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    terms = naive_pointwise(scores, labels)
    loss, stats = pointwise_loss(double(*scores), flags(*labels))
    assert loss.item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-10)
    right = sum(score > 0 if label else score < 0 for score, label in rows)
    assert stats.accuracy.item() == pytest.approx(right / len(rows), rel=1e-6)


def test_pointwise_statistics_by_hand() -> None:
    # Right, right, wrong, wrong; a score of 0 is right for neither label.
    _, stats = pointwise_loss(
        double(1, -1, -1, 0).requires_grad_(), flags(True, False, True, False)
    )
    assert stats.accuracy.item() == 0.5
    assert not stats.accuracy.requires_grad


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("score", [-1000.0, 1000.0])
def test_sure_scores_do_not_overflow(score: float, label: bool) -> None:
    scores = double(score).requires_grad_()
    loss, _ = pointwise_loss(scores, flags(label))
    assert loss.item() == (0.0 if (score > 0) == label else 1000.0)
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_pointwise_gradient_by_hand() -> None:
    # dL/dr = (sigmoid(r) - label) / B; sigmoid(log 3) = 3/4, B = 2.
    scores = double(math.log(3), math.log(3)).requires_grad_()
    loss, _ = pointwise_loss(scores, flags(True, False))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.tolist() == pytest.approx([-1 / 8, 3 / 8], rel=1e-14)


def test_pointwise_gradcheck() -> None:
    scores = double(1.0, -0.5, 2.0).requires_grad_()
    labels = flags(True, True, False)
    assert torch.autograd.gradcheck(lambda r: pointwise_loss(r, labels)[0], scores)


def test_pointwise_micro_batches_add_up_to_the_whole() -> None:
    scores, labels = double(1.0, -0.5, 2.0).requires_grad_(), flags(True, False, False)
    whole, _ = pointwise_loss(scores, labels)
    one, _ = pointwise_loss(scores[:1], labels[:1], 3)
    two, _ = pointwise_loss(scores[1:].flip(0), labels[1:].flip(0), torch.tensor(3))
    torch.testing.assert_close(one + two, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(one + two, scores)[0],
        torch.autograd.grad(whole, scores)[0],
        rtol=1e-14,
        atol=0,
    )


def test_pairwise_micro_batches_may_be_given_the_pairs_of_the_whole() -> None:
    chosen, rejected = double(1.0, -0.5, 2.0), double(0.3, 0.4, -2.0)
    whole, _ = pairwise_loss(chosen, rejected, centering=0.1)
    parts = [
        pairwise_loss(chosen[part], rejected[part], centering=0.1, num_pairs=3)[0]
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-14, atol=0)
