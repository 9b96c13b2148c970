"""Tiny models and a tokenizer, in memory and as folders."""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from plumbline.data.tokenize import ChatEncoder, train_tokenizer
from plumbline.models.load import build_scratch_model
from plumbline.models.packed_attention import take_packed
from plumbline.models.scalar_head import scalar_model_from_lm
from plumbline.params.schema import ScratchModel

TEXTS = (
    "How do I fold a paper plane? Fold the sheet along the middle, then fold both wings.",
    "Where does the river end? The river ends in the lake behind the old mill.",
    "Please tell me how to fold a napkin. Fold it in half, and then fold it in half again.",
    "Why is the sky blue? The air scatters blue light more than it scatters red light.",
)


@pytest.fixture(autouse=True, scope="session")
def quick_collections() -> None:
    """Each training collects garbage; what the imports left behind need not be searched again."""
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def shared_lm(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    params = ScratchModel(
        source="scratch", vocab_size=300, context_tokens=64, hidden_size=32, layers=2, heads=2
    )
    model = build_scratch_model(params, tokenizer, seed=0).eval()
    # Fresh weights say nearly the same at every position: a fault in the positions would hide.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    # Which tries it out; some tests count what is read from then on.
    assert take_packed(model)
    return model


@pytest.fixture
def lm(shared_lm: PreTrainedModel) -> PreTrainedModel:
    """A copy that a test may train."""
    return copy.deepcopy(shared_lm)


ROPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROPE, tie_word_embeddings=True)),
}  # fmt: skip


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def shared_family_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def family_lm(shared_family_lm: PreTrainedModel) -> PreTrainedModel:
    """A tiny language model of each family that users bring, a copy that a test may train."""
    return copy.deepcopy(shared_family_lm)


@pytest.fixture(scope="session")
def in_double() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Makes a model count in float64 throughout: some would take their norms in float32."""

    def widen(model: PreTrainedModel) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if hasattr(module, "variance_epsilon"):
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
        return model.double()

    return widen


@pytest.fixture(scope="session")
def lm_folder(
    shared_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    shared_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_scorer(lm_folder: Path) -> PreTrainedModel:
    model = scalar_model_from_lm(lm_folder, seed=1).eval()
    assert take_packed(model)
    return model


@pytest.fixture
def scorer(shared_scorer: PreTrainedModel) -> PreTrainedModel:
    """A scalar model on the language model, a copy that a test may change."""
    return copy.deepcopy(shared_scorer)


@pytest.fixture(scope="session")
def as_prompt() -> Callable[[str], str]:
    """A text as the request of a conversation, in canonical JSON."""

    def make(text: str) -> str:
        return json.dumps([{"role": "user", "content": text}])

    return make


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """Token ids of six sequences of different lengths, which hold no special token."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(5, 300, (length,), generator=generator).tolist()
        for length in (9, 2, 14, 5, 7, 1)
    ]
