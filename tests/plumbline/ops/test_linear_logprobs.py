"""Log-probabilities from hidden states against those of whole logits, and what they take."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbline.ops import linear_logprobs as module
from plumbline.ops.linear_logprobs import linear_logprobs

N, H, V = 7, 5, 53


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = torch.tensor([0, 52, 26, 1, 1, 40, 13])
    return normal(N, H), normal(V, H), normal(V), tokens


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[torch.arange(len(tokens)), tokens], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=[10**9, 4 * N * 8, 1], ids=["one block", "blocks of 8", "blocks of 1"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param)


def test_by_hand(blocks: None) -> None:
    # softmax of logits (0, log 3): 1/4 and 3/4. At temperature 2: 1 and sqrt(3) of their sum.
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    stats = linear_logprobs(hidden, weight, None, torch.tensor([0]))
    assert stats.logprobs.item() == pytest.approx(math.log(1 / 4), rel=1e-14)
    assert stats.entropies.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-14)
    warm = linear_logprobs(hidden, weight, None, torch.tensor([1]), 2.0)
    assert warm.logprobs.item() == pytest.approx(math.log(3**0.5 / (1 + 3**0.5)), rel=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_log_softmax_of_the_logits(
    blocks: None, with_bias: bool, temperature: float
) -> None:
    hidden, weight, bias, tokens = inputs()
    given = (hidden, weight, bias if with_bias else None, tokens, temperature)
    for mine, expected in zip(linear_logprobs(*given), naive(*given), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("terms", ["logprobs", "entropies", "both"])
def test_gradients_are_those_of_the_logits(blocks: None, terms: str, temperature: float) -> None:
    *weights, tokens = inputs()
    leaves = [weight.requires_grad_() for weight in weights]
    by_logprobs = torch.linspace(-1, 2, N).double() * (terms != "entropies")
    by_entropies = torch.linspace(3, 1, N).double() * (terms != "logprobs")

    def gradients(logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, ...]:
        loss = (by_logprobs * logprobs).sum() if terms != "entropies" else 0
        loss = loss + ((by_entropies * entropies).sum() if terms != "logprobs" else 0)
        return torch.autograd.grad(loss, leaves)

    mine = gradients(*linear_logprobs(*leaves, tokens, temperature))
    expected = gradients(*naive(*leaves, tokens, temperature))
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_gradcheck(blocks: None) -> None:
    *weights, tokens = inputs()
    leaves = [weight.requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_logprobs(hidden, weight, bias, tokens, 0.7), leaves
    )


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, weight, bias, tokens = inputs()
    linear_logprobs(hidden.requires_grad_(), weight, bias, tokens).logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is bias.grad is None


def test_far_logits_stay_exact(blocks: None) -> None:
    # exp of either would be infinite or 0.
    weight = torch.tensor([[1e4], [1e4 - 1.0], [-1e4]]).double()
    stats = linear_logprobs(torch.ones(3, 1).double(), weight, None, torch.tensor([0, 1, 2]))
    lse = math.log1p(math.exp(-1))
    assert stats.logprobs.tolist() == pytest.approx([-lse, -1 - lse, -2e4 - lse], rel=1e-12)
    p = 1 / (1 + math.exp(-1))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert stats.entropies.tolist() == pytest.approx([entropy] * 3, abs=1e-11)


def test_under_autocast_products_are_narrow_and_gradients_of_weights_wide(blocks: None) -> None:
    *weights, tokens = inputs(torch.float32)
    leaves = [weight.requires_grad_() for weight in weights]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = linear_logprobs(*leaves, tokens)
    wide = linear_logprobs(*leaves, tokens)
    assert narrow.logprobs.dtype == torch.float32
    assert not torch.equal(narrow.logprobs, wide.logprobs)
    torch.testing.assert_close(narrow.logprobs, wide.logprobs, atol=0.1, rtol=0)
    found = [
        torch.autograd.grad(s.logprobs.sum() + s.entropies.sum(), leaves) for s in (narrow, wide)
    ]
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.99


def test_a_narrow_hidden_state_gets_a_narrow_gradient() -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    hidden = hidden.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        linear_logprobs(hidden, weight, None, tokens).logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: kept for key, kept in self.held.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.held.values()))
        return made


def peak_bytes(vocabulary: int, tokens: int) -> int:
    """The most memory that forward and backward hold at a time, beside the head's weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 16, generator=generator)
    chosen = torch.randint(vocabulary, (tokens,), generator=generator)
    with Peak() as peak:
        stats = linear_logprobs(hidden, weight, None, chosen)
        (stats.logprobs.sum() + stats.entropies.sum()).backward()
    return peak.bytes


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**20)
    small, large = (peak_bytes(vocabulary, 512) for vocabulary in (4_000, 150_000))
    # Whole logits of the larger one would take 300 MB.
    assert 2**20 < small < 8 * 2**20
    assert large < 1.1 * small
