"""Language models and tokenizers: from scratch, from a folder, from the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from plumbline.data.tokenize import PLAIN_TEMPLATE, train_tokenizer
from plumbline.params.schema import HubModel, LocalModel, ScratchModel


def build_scratch_model(
    params: ScratchModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A GPT-2 with random weights, sized by the params, for `tokenizer`."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=params.context_tokens,
        n_embd=params.hidden_size,
        n_layer=params.layers,
        n_head=params.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return no_dropout(GPT2LMHeadModel(config))


def base_tokenizer(
    params: ScratchModel | HubModel | LocalModel, root: Path, texts: Sequence[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model: trained on `texts`, or the pretrained one.

    Args:
        params: section `model`.
        root: where relative paths start.
        texts: what a tokenizer from scratch learns its merges from.
    """
    if isinstance(params, ScratchModel):
        return train_tokenizer(texts, params.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(**_source(params, root))
    if params.chat_template or not tokenizer.chat_template:
        tokenizer.chat_template = params.chat_template or PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return cast(PreTrainedTokenizerBase, tokenizer)


def base_model(
    params: ScratchModel | HubModel | LocalModel,
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> PreTrainedModel:
    """The base model in float32, dropout off: random weights, or the pretrained ones."""
    if isinstance(params, ScratchModel):
        return build_scratch_model(params, tokenizer, seed)
    model = AutoModelForCausalLM.from_pretrained(
        **_source(params, root), dtype=torch.float32, use_safetensors=True
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return no_dropout(cast(PreTrainedModel, model))


def _source(params: HubModel | LocalModel, root: Path) -> dict[str, Any]:
    if isinstance(params, HubModel):
        return {"pretrained_model_name_or_path": params.name, "revision": params.revision}
    folder = root / params.path
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


def load_lm(folder: Path) -> PreTrainedModel:
    """Load the language model in `folder`, dropout off, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return no_dropout(cast(PreTrainedModel, model))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return cast(PreTrainedTokenizerBase, tokenizer)


DROPOUT_RATES = {
    "dropout",
    "layerdrop",
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "classifier_dropout",
}


def no_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Switch dropout off for good: it would make the ratio of the first update differ from 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Many architectures keep the rate as a number of the module and call F.dropout with it.
        for name in DROPOUT_RATES & vars(module).keys():
            setattr(module, name, 0.0)
    for name in DROPOUT_RATES:
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model
