"""SFT: what counts, gradient accumulation, seeds, and the held-out loss against a naive loop."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline.errors import TrainingError
from plumbline.params.schema import SFTParams
from plumbline.training.precision import Precision
from plumbline.training.reporting import ignore_metrics, ignore_progress
from plumbline.training.sft import held_out_loss, train_sft

PAD, EOS = 0, 1
# 14 rows of different lengths: with batches of 8 the last one is short.
ROWS = [
    {
        "prompt": [3, *range(10 + row, 12 + row + row % 4), EOS, 4],
        "response": [*range(40 + row, 41 + row + (row * 5) % 9), EOS],
    }
    for row in range(14)
]


def sft_params(**changes: Any) -> SFTParams:
    defaults: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_fraction": 0.0,
    }
    return SFTParams(**{**defaults, **changes})


def train(
    model: PreTrainedModel, params: SFTParams, seed: int = 0, pad: int = PAD,
    precision: Precision = "fp32",
) -> list[Mapping[str, float]]:  # fmt: skip
    history: list[Mapping[str, float]] = []
    train_sft(
        model, ROWS, params, pad_token_id=pad, seed=seed, precision=precision,
        log=lambda _, metrics: history.append(metrics), progress=ignore_progress,
    )  # fmt: skip
    return history


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def naive_loss(model: PreTrainedModel, *, on_prompt: bool = False) -> float:
    """Mean -log p of the counted tokens of all rows, each row alone."""
    terms = []
    for row in ROWS:
        ids = [*row["prompt"], *row["response"]]
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        first = 1 if on_prompt else len(row["prompt"])
        terms += [-float(logp[t - 1, ids[t]]) for t in range(first, len(ids))]
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("max_tokens", [1, 50, 4096])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_held_out_loss_is_the_mean_over_all_response_tokens(
    lm: PreTrainedModel, max_tokens: int, pad: int
) -> None:
    assert held_out_loss(lm, ROWS, max_tokens, pad) == pytest.approx(naive_loss(lm), abs=1e-5)


def test_training_lowers_the_loss_of_the_responses(lm: PreTrainedModel) -> None:
    before = held_out_loss(lm, ROWS, 4096, PAD)
    train(lm, sft_params(epochs=10))
    assert held_out_loss(lm, ROWS, 4096, PAD) < 0.7 * before
    assert not lm.training


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_first_logged_loss_is_that_of_the_counted_tokens(
    lm: PreTrainedModel, train_on_prompt: bool
) -> None:
    # Ten steps on all rows at a rate that moves nothing: the mean of ten equal losses.
    expected = naive_loss(lm, on_prompt=train_on_prompt)
    params = sft_params(
        epochs=10, batch_size=14, micro_batch_tokens=100, learning_rate=1e-12,
        train_on_prompt=train_on_prompt,
    )  # fmt: skip
    history = train(lm, params)
    assert history[0]["sft/loss"] == pytest.approx(expected, abs=1e-4)


def test_the_prompt_counts_only_where_asked(lm: PreTrainedModel) -> None:
    other = copy.deepcopy(lm)
    train(lm, sft_params())
    train(other, sft_params(train_on_prompt=True))
    assert not torch.equal(weights(lm), weights(other))


def test_micro_batches_leave_the_training_the_same(lm: PreTrainedModel) -> None:
    trained = {}
    for size in (4096, 50, 1):
        model = copy.deepcopy(lm)
        train(model, sft_params(micro_batch_tokens=size, learning_rate=5e-4))
        trained[size] = weights(model)
    assert float((trained[4096] - weights(lm)).abs().max()) > 5e-4
    for size in (50, 1):
        torch.testing.assert_close(trained[size], trained[4096], atol=1e-6, rtol=0)


def test_micro_batches_share_narrow_weights(lm: PreTrainedModel) -> None:
    losses = []
    for size in (4096, 50, 1):
        history = train(
            copy.deepcopy(lm), sft_params(micro_batch_tokens=size, epochs=5), precision="bf16"
        )
        losses.append((history[-1]["sft/loss"], history[-1]["sft/grad_norm"]))
    for split in losses[1:]:
        assert split == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_leaves_the_training_the_same(
    lm: PreTrainedModel, precision: Precision
) -> None:
    trained = []
    for checkpointing in (False, True):
        model = copy.deepcopy(lm)
        forwards: list[bool] = []
        layer = model.transformer.h[0].ln_1
        layer.register_forward_hook(lambda *_, seen=forwards: seen.append(True))
        train(
            model,
            sft_params(gradient_checkpointing=checkpointing, learning_rate=5e-4),
            precision=precision,
        )
        assert len(forwards) == (4 if checkpointing else 2)
        assert not any(module.training for module in model.modules())
        assert not model.is_gradient_checkpointing
        assert not model.get_input_embeddings()._forward_hooks
        trained.append(weights(model))
    torch.testing.assert_close(*trained, atol=1e-6, rtol=0)


def test_bf16_trains_wide_weights_to_nearly_the_same(lm: PreTrainedModel) -> None:
    trained = {}
    for precision in ("fp32", "bf16"):
        model = copy.deepcopy(lm)
        history = train(model, sft_params(epochs=10), precision=precision)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        trained[precision] = weights(model), history[-1]["sft/loss"]
    change, narrow = (trained[name][0] - weights(lm) for name in ("fp32", "bf16"))
    assert not torch.equal(change, narrow)
    assert float(torch.cosine_similarity(change, narrow, dim=0)) > 0.95
    assert trained["bf16"][1] == pytest.approx(trained["fp32"][1], rel=0.05)
    # Twenty steps of at most the rate: weights kept in bf16 could not move so little.
    assert float((narrow != 0).float().mean()) > 0.5


def test_the_pad_token_does_not_matter(lm: PreTrainedModel) -> None:
    other = copy.deepcopy(lm)
    train(lm, sft_params())
    train(other, sft_params(), pad=EOS)
    torch.testing.assert_close(weights(lm), weights(other), atol=1e-6, rtol=0)


def test_the_seed_decides_every_bit(lm: PreTrainedModel) -> None:
    trained = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        model = copy.deepcopy(lm)
        train(model, sft_params(), seed)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_a_loss_that_is_not_finite_stops_with_advice(lm: PreTrainedModel) -> None:
    with torch.no_grad():
        lm.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"sft: the loss is nan .*lower sft\.learning_rate"):
        train_sft(
            lm, ROWS, sft_params(epochs=6), pad_token_id=PAD, seed=0, log=ignore_metrics,
            progress=ignore_progress,
        )  # fmt: skip
