"""One number a token from a language model: reward models and critics."""

import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from plumbline.models.load import no_dropout
from plumbline.models.states import last_states


def scalar_model_from_lm(folder: Path, seed: int) -> PreTrainedModel:
    """Put a fresh scalar head on the language model in `folder`.

    The head's weights are normal with std 1 / sqrt(hidden + 1), without a bias
    (Huang et al. 2024, arXiv 2403.17031).
    """
    model = load_scalar_model(folder, fresh_head=True)
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        std = 1 / math.sqrt(head.in_features + 1)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    return model


def load_scalar_model(folder: Path, *, fresh_head: bool = False) -> PreTrainedModel:
    """Load a reward model or critic from `folder`, dropout off, in float32."""
    level = transformers_logging.get_verbosity()
    if fresh_head:
        # transformers warns that the head is new, which is the point.
        transformers_logging.set_verbosity_error()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            # Without it the text-classification pipeline puts a sigmoid on the score.
            problem_type="regression",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
    finally:
        transformers_logging.set_verbosity(level)
    return no_dropout(cast(PreTrainedModel, model))


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that reads the score off the last hidden state."""
    return cast(nn.Linear, model.score)


def token_values(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, pairs: bool = False
) -> Tensor:
    """One number a position: ids and bool mask [B, T] to [B, T], 0 where the mask is False.

    `pairs`: rows 2i and 2i + 1 share their beginning, as in `last_states`.
    """
    hidden = last_states(getattr(model, model.base_model_prefix), ids, mask, pairs=pairs)
    head = score_head(model)
    # In bf16 a score near 3 would come in steps of 1/64, and different responses would tie.
    with torch.autocast(hidden.device.type, enabled=False):
        values = cast(Tensor, head(hidden.to(head.weight.dtype)).squeeze(-1))
    values = values - score_shift(model)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sequence_scores(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, pairs: bool = False
) -> Tensor:
    """The number at the last real token of each sequence: [B, T] to [B]; `pairs` as above."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(mask, positions, torch.zeros_like(positions)).amax(1)
    values = token_values(model, ids, mask, pairs=pairs)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def score_shift(model: PreTrainedModel) -> float:
    """What normalisation takes from each score where the weights could not absorb it."""
    return float(getattr(model.config, "score_shift", 0.0))


def normalise_scores(model: PreTrainedModel, mean: float, std: float = 1.0) -> None:
    """Change the model so that its score s becomes (s - mean) / std, wherever it is loaded.

    The scale goes into the head. The shift goes into the bias of the last layer norm, along the
    head's weight w: a bias of -c * w / |w|^2 lowers every score by exactly c. Models without such a
    bias (RMSNorm) keep the shift in their config, as `score_shift`.

    Raises:
        ValueError: `std` is not positive.
    """
    if not std > 0:
        raise ValueError(f"normalise_scores: expected std > 0, got {std}")
    head = score_head(model)
    with torch.no_grad():
        head.weight.div_(std)
        bias = _final_norm_bias(model)
        if bias is None:
            model.config.score_shift = (score_shift(model) + mean) / std
        else:
            weight = head.weight[0]
            bias.sub_(mean / std * weight / weight.square().sum())


def _final_norm_bias(model: PreTrainedModel) -> nn.Parameter | None:
    backbone = getattr(model, model.base_model_prefix)
    for name in ("ln_f", "final_layer_norm", "final_layernorm", "norm"):
        norm = getattr(backbone, name, None)
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            return norm.bias
    return None
