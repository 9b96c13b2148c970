"""Attention of packed sequences against that of each sequence alone."""

import pytest
import torch
from torch import Tensor

from plumbline.ops import attention
from plumbline.ops.attention import blocks_of, causal_attention

LENGTHS = [5, 1, 8, 3]
# None begins as another does; or the second and fourth as the one before; or three as the first.
SHARED = [[0, 0, 0, 0], [0, 4, 0, 6], [0, 5, 1, 2]]


@pytest.fixture(params=[1, 4, 8])
def multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of which blocks' lengths are made; with 8 all are alike, and go into one product."""
    monkeypatch.setattr(attention, "size_multiple", lambda *_: request.param)
    return int(request.param)


def inputs(groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Values need not be as wide as keys.
    return [
        torch.randn(heads, sum(LENGTHS), width, generator=generator, dtype=torch.float64).to(dtype)
        for heads, width in ((6, 4), (groups, 4), (groups, 3))
    ]


def naive(query: Tensor, key: Tensor, value: Tensor, shared: list[int]) -> Tensor:
    """Head by head, sequence by sequence, token by token."""
    share = len(query) // len(key)
    rows = []
    for head in range(len(query)):
        out, start, whole = [], 0, 0
        for length, taken in zip(LENGTHS, shared, strict=True):
            whole = whole if taken else start
            for t in range(start, start + length):
                seen = [*range(whole, whole + taken), *range(start, t + 1)]
                scores = 0.3 * key[head // share, seen] @ query[head, t]
                out.append(scores.softmax(0) @ value[head // share, seen])
            start += length
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.mark.usefixtures("multiple")
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_each_sequence_attends_to_itself(groups: int, shared: list[int]) -> None:
    leaves = [x.requires_grad_() for x in inputs(groups)]
    mine, expected = (
        causal_attention(*leaves, blocks_of(LENGTHS, shared), 0.3),
        naive(*leaves, shared),
    )
    torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-12)
    weights = torch.linspace(-1, 2, mine.numel(), dtype=torch.float64).view_as(mine)
    for one, other in zip(
        torch.autograd.grad((weights * mine).sum(), leaves),
        torch.autograd.grad((weights * expected).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("multiple")
@pytest.mark.parametrize("shared", SHARED)
def test_gradcheck(shared: list[int]) -> None:
    leaves = [x.requires_grad_() for x in inputs(2)]
    assert torch.autograd.gradcheck(
        lambda *x: causal_attention(*x, blocks_of(LENGTHS, shared), 0.3), leaves
    )


def test_narrow_values_give_narrow_outputs_near_the_wide_ones() -> None:
    query, key, value = inputs(2, torch.float32)
    wide = causal_attention(query, key, value, blocks_of(LENGTHS, SHARED[1]), 0.3)
    # Rotary positions widen queries and keys under autocast.
    leaves = [query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_()]
    narrow = causal_attention(*leaves, blocks_of(LENGTHS, SHARED[1]), 0.3)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, atol=0.03, rtol=0)
    narrow.float().sum().backward()
    assert [x.grad.dtype for x in leaves if x.grad is not None] == [x.dtype for x in leaves]
