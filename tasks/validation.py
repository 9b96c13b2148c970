"""Token counting for validation, by the tokenizer that the base model will have."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from plumbline.data.tokenize import ChatEncoder, training_texts
from plumbline.data.validation import Limits, TokenCounter
from plumbline.models.load import base_tokenizer
from plumbline.params.schema import DataParams, ModelParams, ScratchModel


def limits_of(params: DataParams) -> Limits:
    """The limits that the params set."""
    return Limits(params.max_prompt_tokens, params.max_response_tokens)


def token_counter(
    model: ModelParams, root: Path
) -> Callable[[Mapping[str, pd.DataFrame]], TokenCounter]:
    """A function from the tables as read to the counter for them."""

    pretrained = cache(lambda: ChatEncoder(base_tokenizer(model, root, [])))

    def counter(tables: Mapping[str, pd.DataFrame]) -> TokenCounter:
        if not isinstance(model, ScratchModel):
            return pretrained()
        demonstrations = tables["demonstrations"]
        rows = demonstrations[demonstrations["split"] == "train"]
        rows = rows.dropna(subset=["prompt", "response"])
        texts = training_texts(rows["prompt"], rows["response"])
        return ChatEncoder(base_tokenizer(model, root, texts))

    return counter
