"""Token log-probabilities and entropies, against hand values and a plain softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.ops.logprobs import entropy, token_logprobs

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=50)

logit_rows = st.integers(2, 6).flatmap(
    lambda vocabulary: st.lists(
        st.lists(st.floats(-30, 30), min_size=vocabulary, max_size=vocabulary),
        min_size=1,
        max_size=4,
    )
)
temperatures = st.floats(0.3, 3)


def naive_logprobs(logits: list[float], temperature: float) -> list[float]:
    """log softmax(logits / temperature), term by term."""
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    log_total = top + math.log(math.fsum(math.exp(s - top) for s in scaled))
    return [s - log_total for s in scaled]


def naive_entropy(logits: list[float], temperature: float) -> float:
    """-sum p log p, a term of p = 0 counting as 0."""
    return -math.fsum(
        math.exp(logp) * logp for logp in naive_logprobs(logits, temperature) if logp > -math.inf
    )


def test_logprobs_by_hand() -> None:
    # softmax(0, log 3) = 1/4, 3/4.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    got = token_logprobs(logits, torch.tensor([0, 1]))
    assert got.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], rel=1e-14)


def test_temperature_divides_the_logits() -> None:
    # softmax((0, 2 log 3) / 2) = 1/4, 3/4; at temperature 1 it is 1/10, 9/10.
    logits = torch.tensor([0.0, 2 * math.log(3)], dtype=torch.float64)
    token = torch.tensor(1)
    assert token_logprobs(logits, token, 2.0).item() == pytest.approx(math.log(3 / 4), rel=1e-14)
    assert token_logprobs(logits, token).item() == pytest.approx(math.log(9 / 10), rel=1e-14)


@given(logit_rows, temperatures, st.integers(0, 1000))
@repeatable
def test_logprobs_agree_with_a_plain_softmax(
    rows: list[list[float]], temperature: float, draw: int
) -> None:
    tokens = [(draw + i) % len(row) for i, row in enumerate(rows)]
    got = token_logprobs(torch.tensor(rows, dtype=torch.float64), torch.tensor(tokens), temperature)
    expected = [
        naive_logprobs(row, temperature)[token] for row, token in zip(rows, tokens, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = token_logprobs(logits.expand(7, 7), torch.arange(7), 0.7)
    assert math.fsum(math.exp(logp) for logp in got.tolist()) == pytest.approx(1, abs=1e-14)


def test_each_token_is_looked_up_at_its_own_position() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[0, 4, 2], [3, 3, 1]])
    got = token_logprobs(logits, tokens, 1.3)
    assert got.shape == (2, 3)
    for row in range(2):
        for t in range(3):
            expected = naive_logprobs(logits[row, t].tolist(), 1.3)[int(tokens[row, t])]
            assert got[row, t].item() == pytest.approx(expected, rel=1e-13)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([1e4, 1e4, -1e4], dtype=torch.float64)
    assert token_logprobs(logits, torch.tensor(0)).item() == pytest.approx(-math.log(2), rel=1e-11)
    assert entropy(logits).item() == pytest.approx(math.log(2), rel=1e-11)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_float32_or_wider(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = torch.zeros(2, 3, dtype=given_dtype)
    assert token_logprobs(logits, torch.tensor([0, 1])).dtype == expected
    assert entropy(logits).dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    # bfloat16 holds 8 bits: a log-sum over 1,000 tokens in it is off by about 0.03 nats.
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(3, 1000, generator=generator) * 2).to(dtype)
    tokens = torch.tensor([0, 500, 999])
    logprobs = token_logprobs(logits, tokens, 0.7).tolist()
    entropies = entropy(logits, 0.7).tolist()
    for row in range(3):
        rounded = [float(logit) for logit in logits[row]]
        assert logprobs[row] == pytest.approx(
            naive_logprobs(rounded, 0.7)[int(tokens[row])], abs=2e-5
        )
        assert entropies[row] == pytest.approx(naive_entropy(rounded, 0.7), abs=2e-5)


def test_temperature_is_applied_after_widening() -> None:
    # 40,000 / 0.5 is more than float16 can hold (65,504).
    logits = torch.tensor([40_000.0, 40_000.0], dtype=torch.float16)
    got = token_logprobs(logits, torch.tensor(0), 0.5).item()
    assert got == pytest.approx(-math.log(2), abs=1e-2)


def test_entropy_by_hand() -> None:
    # p = 1/4, 3/4: -(1/4 log 1/4 + 3/4 log 3/4) = log 4 - 3/4 log 3.
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=torch.float64)
    expected = [math.log(4) - 0.75 * math.log(3), math.log(2)]
    assert entropy(logits).tolist() == pytest.approx(expected, rel=1e-14)


def test_entropy_at_a_temperature_by_hand() -> None:
    # (0, 2 log 3) at temperature 2 is 1/4, 3/4 again.
    logits = torch.tensor([0.0, 2 * math.log(3)], dtype=torch.float64)
    expected = math.log(4) - 0.75 * math.log(3)
    assert entropy(logits, 2.0).item() == pytest.approx(expected, rel=1e-14)


@given(logit_rows, temperatures)
@repeatable
def test_entropy_agrees_with_a_plain_sum(rows: list[list[float]], temperature: float) -> None:
    got = entropy(torch.tensor(rows, dtype=torch.float64), temperature)
    expected = [naive_entropy(row, temperature) for row in rows]
    assert got.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_a_forbidden_token_adds_no_entropy() -> None:
    # A logit of -inf is a probability of 0, and p log p goes to 0 with p.
    logits = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    assert entropy(logits).item() == pytest.approx(math.log(2), rel=1e-14)
    assert token_logprobs(logits, torch.tensor(0)).item() == pytest.approx(-math.log(2), rel=1e-14)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    tokens = torch.tensor([[0, 3, 2], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, 0.7), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 0.7), logits)
