"""Low-rank adapters on the linear layers of a model (Hu et al. 2021, arXiv 2106.09685)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumbline.params.schema import LoraParams

HEAD = "score"
"""The scalar head, which is small and new: it is trained in full."""


def add_adapter(model: PreTrainedModel, params: LoraParams, seed: int) -> None:
    """Freeze the model and put trainable adapters on the linear layers of its blocks.

    An adapter starts as zero, so that the model at first says what it said before.

    Args:
        model: a language model or a scalar model.
        params: rank and alpha.
        seed: of the adapters' weights.
    """
    outputs = model.get_output_embeddings()
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not outputs and name != HEAD
    }
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        # GPT-2 keeps its linear layers transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    # New layers are in training mode, whatever the model is in.
    model.train(model.training)
    if (head := getattr(model, HEAD, None)) is not None:
        head.requires_grad_(True)


@contextmanager
def trained_as_adapter(model: PreTrainedModel, params: LoraParams, seed: int) -> Iterator[None]:
    """Train adapters inside the context where the params say so, and merge them as it ends."""
    if not params.enabled:
        yield
        return
    add_adapter(model, params, seed)
    yield
    merge_adapter(model)


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it was before its adapter was trained, which makes the reference policy."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the adapters to the weights, and leave a model without adapters."""
    for name, layer in list(_adapted(model)):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the adapters alone, with a name for the model that they change."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
        # peft makes a set of them, which each process would write in another order.
        config.target_modules = sorted(config.target_modules)
    with warnings.catch_warnings():
        # peft looks for a folder of that name, to compare vocabularies.
        warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
        model.save_pretrained(folder)


def load_merged(model: PreTrainedModel, folder: Path) -> None:
    """Read the adapters in `folder` and add them to the weights of the model they belong to."""
    conversions = getattr(model, "_weight_conversions", None)
    model.load_adapter(str(folder))
    merge_adapter(model)
    # transformers would go on writing the weights under the names that adapters have in files.
    model._weight_conversions = conversions


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    )
