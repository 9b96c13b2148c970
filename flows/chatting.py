"""Talking to a registered model."""

import json
from collections.abc import Callable

import torch

from plumbline.data.tokenize import ChatEncoder
from plumbline.models.load import load_tokenizer
from plumbline.rollout.generate import sample_responses
from tasks import model_store
from tasks.progress import quiet_libraries


def open_chat(name: str, *, temperature: float, max_tokens: int, seed: int) -> Callable[[str], str]:
    """Load NAME@ALIAS or NAME/VERSION; returns a function from a request to an answer.

    Raises:
        ParamsError: the registry has no such model.
    """
    quiet_libraries()
    folder = model_store.registered_folder(name)
    model = model_store.open_policy(folder).eval()
    encoder = ChatEncoder(load_tokenizer(folder / "components" / "tokenizer"))
    generator = torch.Generator().manual_seed(seed)

    def answer(request: str) -> str:
        prompt = json.dumps([{"role": "user", "content": request}])
        queries = encoder.prompts([prompt])
        context = int(getattr(model.config, "max_position_embeddings", 2**31))
        room = context - len(queries[0])
        if room < 1:
            return f"(Your message has {len(queries[0])} tokens; the model takes {context}.)"
        responses = sample_responses(
            model,
            queries,
            max_tokens=min(max_tokens, room),
            stop_token_ids=encoder.stop_token_ids,
            pad_token_id=encoder.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        return encoder.decode(responses.lists())[0]

    return answer
