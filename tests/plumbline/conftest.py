"""A tiny GPT-2 and its tokenizer, as models in memory and as folders."""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.data.tokenize import ChatEncoder, train_tokenizer
from plumbline.models.load import build_scratch_model
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
    return model


@pytest.fixture
def lm(shared_lm: PreTrainedModel) -> PreTrainedModel:
    """A copy that a test may train."""
    return copy.deepcopy(shared_lm)


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
    return scalar_model_from_lm(lm_folder, seed=1).eval()


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
