"""The SFT loss against hand values and a plain cross-entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plumbline.losses.sft import IGNORE, sft_loss

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

VOCABULARY = 5


@st.composite
def label_rows(draw: st.DrawFn) -> list[list[int]]:
    """Labels with IGNORE anywhere, and at least one that counts."""
    width = draw(st.integers(2, 6))
    label = st.one_of(st.just(-100), st.integers(0, VOCABULARY - 1))
    rows = draw(st.lists(st.lists(label, min_size=width, max_size=width), min_size=1, max_size=4))
    rows[0][1] = draw(st.integers(0, VOCABULARY - 1))
    return rows


def random_logits(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, VOCABULARY, dtype=torch.float64, generator=generator) * 3


def naive_sft_terms(logits: list[list[list[float]]], labels: list[list[int]]) -> list[float]:
    """-log p of each counted label, token t + 1 read from the logits at t."""
    terms = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        for t in range(len(row_labels) - 1):
            if row_labels[t + 1] != -100:
                total = math.fsum(math.exp(logit) for logit in row_logits[t])
                terms.append(math.log(total) - row_logits[t][row_labels[t + 1]])
    return terms


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


LABELS = torch.tensor([[-100, -100, 2, 4, -100], [3, 1, -100, 0, 2], [-100, 0, -100, -100, -100]])
# The logits at t count where the label at t + 1 does; those of the last position never do.
COUNTED = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_the_ignored_label_is_the_one_transformers_uses() -> None:
    assert IGNORE == -100


def test_loss_by_hand() -> None:
    # softmax(0, log 3) = 1/4, 3/4. Token 1 costs log 4/3, token 0 costs log 4.
    logits = torch.tensor([[[0.0, math.log(3)]] * 3], dtype=torch.float64)
    both = (math.log(4 / 3) + math.log(4)) / 2
    assert sft_loss(logits, torch.tensor([[1, 1, 0]])).item() == pytest.approx(both, rel=1e-13)
    only_first = sft_loss(logits, torch.tensor([[1, 1, -100]])).item()
    assert only_first == pytest.approx(math.log(4 / 3), rel=1e-13)


def test_equal_logits_cost_the_log_of_the_vocabulary() -> None:
    loss = sft_loss(torch.zeros(2, 4, VOCABULARY, dtype=torch.float64), torch.ones(2, 4).long())
    assert loss.item() == pytest.approx(math.log(VOCABULARY), rel=1e-13)


def test_position_t_predicts_the_token_after_it() -> None:
    labels = torch.tensor([[0, 1, 2, 3]])
    logits = torch.zeros(1, 4, VOCABULARY, dtype=torch.float64)
    for t, following in enumerate((1, 2, 3)):
        logits[0, t, following] = 100.0
    assert sft_loss(logits, labels).item() < 1e-12


@given(label_rows(), st.integers(0, 2**16))
@repeatable
def test_loss_agrees_with_a_plain_cross_entropy(labels: list[list[int]], seed: int) -> None:
    logits = random_logits(len(labels), len(labels[0]), seed)
    terms = naive_sft_terms(logits.tolist(), labels)
    expected = math.fsum(terms) / len(terms)
    assert sft_loss(logits, torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-12)


def test_a_given_number_of_tokens_divides_the_sum() -> None:
    logits = random_logits(3, 5)
    total = math.fsum(naive_sft_terms(logits.tolist(), LABELS.tolist()))
    assert sft_loss(logits, LABELS, 17).item() == pytest.approx(total / 17, rel=1e-12)
    as_tensor = sft_loss(logits, LABELS, torch.tensor(17)).item()
    assert as_tensor == pytest.approx(total / 17, rel=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    # The rows count 2, 3 and 1 tokens, so a mean of micro-batch means would be wrong.
    logits = random_logits(3, 5).requires_grad_()
    whole = sft_loss(logits, LABELS)
    parts = [
        sft_loss(part_logits, part_labels, 6)
        for part_logits, part_labels in zip(
            torch.split(logits, list(sizes)), torch.split(LABELS, list(sizes)), strict=True
        )
    ]
    split = torch.stack(parts).sum()
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        gradient(split, logits), gradient(whole, logits), rtol=1e-12, atol=1e-15
    )


def test_a_micro_batch_that_counts_nothing_adds_nothing() -> None:
    labels = torch.full((1, 4), -100)
    logits = random_logits(1, 4).requires_grad_()
    loss = sft_loss(logits, labels, 6)
    assert loss.item() == 0
    assert not gradient(loss, logits).any()


@pytest.mark.parametrize("labels", [[[-100, -100]], [[3, -100]]])
def test_a_batch_that_counts_nothing_is_refused(labels: list[list[int]]) -> None:
    # The first token has no position before it that could predict it.
    with pytest.raises(ValueError, match="at least one counted label"):
        sft_loss(random_logits(1, 2), torch.tensor(labels))


def test_only_counted_positions_get_a_gradient() -> None:
    logits = random_logits(3, 5).requires_grad_()
    got = gradient(sft_loss(logits, LABELS), logits)
    assert got[~COUNTED].abs().max().item() == 0
    assert (got[COUNTED].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_in_uncounted_positions_has_no_effect(garbage: float) -> None:
    clean = random_logits(3, 5).requires_grad_()
    planted = clean.detach().masked_fill(~COUNTED.unsqueeze(-1), garbage).requires_grad_()
    loss = sft_loss(planted, LABELS)
    expected = sft_loss(clean, LABELS)
    assert loss.item() == expected.item()
    got = gradient(loss, planted)
    assert got[~COUNTED].tolist() == [[0.0] * VOCABULARY] * 9
    assert torch.equal(got[COUNTED], gradient(expected, clean)[COUNTED])


def test_padding_and_batch_order_have_no_effect() -> None:
    logits = random_logits(3, 5).requires_grad_()
    loss = sft_loss(logits, LABELS)
    expected = gradient(loss, logits)

    wider = torch.cat([logits, random_logits(3, 2, seed=1)], 1)
    padded = sft_loss(wider, torch.cat([LABELS, torch.full((3, 2), -100)], 1))
    torch.testing.assert_close(padded, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(padded, logits), expected, rtol=1e-12, atol=1e-15)

    order = torch.tensor([2, 0, 1])
    shuffled = sft_loss(logits[order], LABELS[order])
    torch.testing.assert_close(shuffled, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient(shuffled, logits), expected, rtol=1e-12, atol=1e-15)


def test_gradcheck() -> None:
    logits = random_logits(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, LABELS), logits)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, LABELS, 17), logits)


def test_half_precision_logits_are_widened() -> None:
    logits = random_logits(3, 5).to(torch.bfloat16)
    loss = sft_loss(logits, LABELS)
    assert loss.dtype == torch.float32
    terms = naive_sft_terms(logits.tolist(), LABELS.tolist())
    assert loss.item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-5)
