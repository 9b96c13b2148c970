"""How MLflow loads a logged adapter as a function of texts: merged into the model it changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
from transformers import pipeline

from plumbline.models.load import load_tokenizer
from tasks.model_store import open_policy


class _Continuations:
    """From texts to what the model says next, as a whole model of the store does it."""

    def __init__(self, folder: Path, max_new_tokens: int) -> None:
        self._generate = pipeline(
            "text-generation",
            model=open_policy(folder).eval(),
            tokenizer=load_tokenizer(folder / "components" / "tokenizer"),
        )
        self._max_new_tokens = max_new_tokens

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        if isinstance(model_input, pandas.DataFrame):
            model_input = model_input.iloc[:, 0].tolist()
        texts = [model_input] if isinstance(model_input, str) else list(model_input)
        options = {"max_new_tokens": self._max_new_tokens, **(params or {})}
        made = self._generate(texts, return_full_text=False, **options)
        return [answers[0]["generated_text"] for answers in made]


def _load_pyfunc(path: str, model_config: Mapping[str, Any]) -> _Continuations:
    """Called by MLflow with the folder of a logged adapter."""
    return _Continuations(Path(path), int(model_config["max_new_tokens"]))
