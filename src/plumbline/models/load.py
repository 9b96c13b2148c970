"""Language models and tokenizers: from scratch, from a folder, from the hub, from a GGUF file."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from plumbline.data.tokenize import PLAIN_TEMPLATE, ChatEncoder, special_tokens, train_tokenizer
from plumbline.errors import ParamsError
from plumbline.models.gguf import gguf_path
from plumbline.params.schema import GGUFModel, HubModel, ModelParams, PretrainedModel, ScratchModel


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
    params: ModelParams, root: Path, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model: trained on `texts`, or the pretrained one.

    Args:
        params: section `model`.
        root: where relative paths start.
        texts: what a tokenizer from scratch learns its merges from.

    Raises:
        ParamsError: the GGUF file is missing or can't be read, or the chat template is malformed.
    """
    if isinstance(params, ScratchModel):
        return train_tokenizer(texts, params.vocab_size)
    with _reading(params):
        tokenizer = AutoTokenizer.from_pretrained(**_source(params, root))
    if params.chat_template or not tokenizer.chat_template:
        tokenizer.chat_template = params.chat_template or PLAIN_TEMPLATE
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "left"
    return cast(PreTrainedTokenizerBase, tokenizer)


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token that ends no response, where the tokenizer has one; else its end token.

    Plain transformers reads a sequence's score at the last token that is no pad. Were the pad the
    end token, it would read one token early, and not the score that was trained.
    """
    ends = {tokenizer.convert_ids_to_tokens(i) for i in ChatEncoder(tokenizer).stop_token_ids}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in ends:
        return str(tokenizer.pad_token)
    template = str(tokenizer.chat_template)
    unused = [
        token
        for token in special_tokens(tokenizer)
        if token not in ends and token != tokenizer.bos_token and token not in template
    ]
    named = [token for token in unused if "pad" in token.lower()]
    reserved = [token for token in unused if re.search("reserved|unused", token)]
    unknown = [token for token in unused if token == tokenizer.unk_token]
    last_resort = str(tokenizer.pad_token or tokenizer.eos_token)
    return next(iter([*named, *reserved, *unknown]), last_resort)


def base_model(
    params: ModelParams, root: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The base model in float32, dropout off: random weights, or the pretrained ones.

    Raises:
        ParamsError: the GGUF file is missing or can't be read.
    """
    if isinstance(params, ScratchModel):
        return build_scratch_model(params, tokenizer, seed)
    with _reading(params):
        model = AutoModelForCausalLM.from_pretrained(
            **_source(params, root), dtype=torch.float32, use_safetensors=True
        )
    if isinstance(params, GGUFModel):
        model = _as_ordinary(model)
    encoder = ChatEncoder(tokenizer)
    ends = list(encoder.stop_token_ids)
    model.config.pad_token_id = model.generation_config.pad_token_id = encoder.pad_token_id
    # A served model must stop where a turn ends, not only where the pretraining's documents did.
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return no_dropout(cast(PreTrainedModel, model))


def _source(params: PretrainedModel, root: Path) -> dict[str, Any]:
    if isinstance(params, HubModel):
        return {"pretrained_model_name_or_path": params.name, "revision": params.revision}
    if isinstance(params, GGUFModel):
        path = gguf_path(params, root)
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {**where, "local_files_only": True}
    folder = root / params.path
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


@contextmanager
def _reading(params: PretrainedModel) -> Iterator[None]:
    """Turn what a GGUF file can't be read for into an error that names the param."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        if not isinstance(params, GGUFModel):
            raise
        raise ParamsError(
            f"model.file: transformers can't load {params.file} ({error}). "
            "Take a GGUF file of a Llama, Mistral, Qwen2 or another architecture that it reads."
        ) from error


def _as_ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the memory of its GGUF file, which would keep it from being saved."""
    config = model.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    ordinary = type(model)(config)
    ordinary.load_state_dict(model.state_dict())
    ordinary.generation_config = model.generation_config
    return cast(PreTrainedModel, ordinary)


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
