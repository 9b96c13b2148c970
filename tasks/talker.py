"""A registered model that answers, sampled as in training: its chat template, its stop tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from plumbline.data.tokenize import ChatEncoder
from plumbline.errors import DataError
from plumbline.models.load import load_tokenizer
from plumbline.rollout.generate import sample_responses
from plumbline.training.device import training_device
from tasks import model_store


class Reply(NamedTuple):
    """An answer."""

    text: str
    ended: bool
    """False where the limit came before a stop token."""
    prompt_tokens: int
    tokens: int


class Talker:
    """A model in memory that answers conversations, one at a time."""

    def __init__(self, name: str) -> None:
        """Load NAME@ALIAS or NAME/VERSION; an adapter is merged into the model that it changes.

        Raises:
            ParamsError: the registry has no such model.
        """
        folder = model_store.registered_folder(name)
        self.model = model_store.open_policy(folder).to(training_device()).eval()
        self.encoder = ChatEncoder(load_tokenizer(folder / "components" / "tokenizer"))

    def reply(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        max_tokens: int,
        generator: torch.Generator,
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: each with role and content, the user's last.
            temperature: divides the logits.
            max_tokens: the longest answer, its end token included; less where the context ends.
            generator: the only source of randomness.

        Raises:
            DataError: the conversation fills the context, or the chat template refuses it.
        """
        queries = self.encoder.prompts([json.dumps([dict(message) for message in messages])])
        context = int(getattr(self.model.config, "max_position_embeddings", 2**31))
        room = context - len(queries[0])
        if room < 1:
            raise DataError(
                f"The conversation has {len(queries[0])} tokens: expected fewer than the model's "
                f"context of {context}. Say less."
            )
        responses = sample_responses(
            self.model,
            queries,
            max_tokens=min(max_tokens, room),
            stop_token_ids=self.encoder.stop_token_ids,
            pad_token_id=self.encoder.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        rows = responses.lists()
        return Reply(
            self.encoder.decode(rows)[0], bool(responses.has_eos[0]), len(queries[0]), len(rows[0])
        )

    def generator(self, seed: int) -> torch.Generator:
        """A source of randomness on the model's device."""
        return torch.Generator(self.model.device).manual_seed(seed)
