"""The SFT loss against hand values."""

import math

import pytest
import torch

from plumbline.losses.sft import IGNORE, sft_loss


def test_the_ignored_label_is_the_one_transformers_uses() -> None:
    assert IGNORE == -100


def test_loss_by_hand() -> None:
    # Tokens of probability 3/4 and 1/4 cost log 4/3 and log 4.
    logprobs = torch.tensor([3 / 4, 1 / 4], dtype=torch.float64).log()
    both = (math.log(4 / 3) + math.log(4)) / 2
    assert sft_loss(logprobs, 2).item() == pytest.approx(both, rel=1e-14)
    assert sft_loss(logprobs, torch.tensor(17)).item() == pytest.approx(both * 2 / 17, rel=1e-14)


@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 4), (6, 0)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    # Of different sizes, so that a mean of means would be wrong.
    logprobs = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [sft_loss(part, 6) for part in torch.split(logprobs, list(sizes))]
    torch.testing.assert_close(torch.stack(parts).sum(), sft_loss(logprobs, 6), rtol=1e-14, atol=0)


def test_gradcheck() -> None:
    logprobs = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, 17), logprobs.requires_grad_())
