"""Token counting for validation, by the tokenizer that the base model will have."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from plumbline.data.tables import Table
from plumbline.data.tokenize import ChatEncoder, training_texts
from plumbline.data.validation import Limits, TokenCounter
from plumbline.models.load import base_tokenizer
from plumbline.params.schema import DataParams, ModelParams, ScratchModel


def limits_of(params: DataParams) -> Limits:
    """The limits that the params set."""
    return Limits(params.max_prompt_tokens, params.max_response_tokens)


def token_counter(model: ModelParams, root: Path) -> Callable[[Mapping[str, Table]], TokenCounter]:
    """A function from the tables as read to the counter for them."""

    pretrained = cache(lambda: ChatEncoder(base_tokenizer(model, root, [])))

    def counter(tables: Mapping[str, Table]) -> TokenCounter:
        if not isinstance(model, ScratchModel):
            return pretrained()
        return ChatEncoder(base_tokenizer(model, root, _texts(tables["demonstrations"])))

    return counter


def _texts(demonstrations: Table) -> Iterator[str]:
    """What a tokenizer from scratch is trained on: the training rows, in file order."""
    for rows in demonstrations.batches():
        train = rows[rows["split"] == "train"].dropna(subset=["prompt", "response"])
        yield from training_texts(train["prompt"], train["response"])
