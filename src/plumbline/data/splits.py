"""Train or test, decided by the prompt alone, so that every file of a data set agrees."""

import hashlib
import json
import unicodedata
from typing import Literal

import pandas as pd

Split = Literal["train", "test"]


def prompt_id(prompt: str) -> str:
    """SHA-256 (64 hex digits) of a conversation, blind to case, white space and Unicode form.

    `prompt` is the canonical JSON of a list of messages (`formats.read_batches`). Prompts that a
    reader would call the same must not be trained on here and tested on there, so each content is
    brought to NFKC, case-folded, and its white space collapsed before it is hashed.
    """
    turns = [
        f"[{_quoted(turn['role'])}, {_quoted(_normalise(turn['content']))}]"
        for turn in json.loads(prompt)
    ]
    return hashlib.sha256(f"[{', '.join(turns)}]".encode()).hexdigest()


def with_prompt_ids(frame: pd.DataFrame) -> pd.DataFrame:
    """Canonical rows with `prompt_id`, null where the prompt is."""
    prompts = frame["prompt"].tolist()
    # A prompt often has several pairs.
    ids = {prompt: prompt_id(prompt) for prompt in {*prompts} if isinstance(prompt, str)}
    return frame.assign(prompt_id=pd.array([ids.get(prompt) for prompt in prompts], dtype="str"))


def split_of(prompt_id: str, test_fraction: float) -> Split:
    """The split of a prompt: its first 8 bytes, read as a number in [0, 1), against the fraction.

    Nothing but the prompt decides, so added rows move no old row, and a larger `test_fraction`
    only moves prompts from train to test.
    """
    # An integer against a scaled fraction is compared exactly; dividing would round 64 bits to 53.
    return "test" if int(prompt_id[:16], 16) < test_fraction * 2**64 else "train"


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Case folding can leave a decomposed character behind, so the form is settled once more.
    return " ".join(unicodedata.normalize("NFKC", folded).split())


# Of a text alone the encoder is three times as fast as of a list.
_quoted = json.JSONEncoder(ensure_ascii=False).encode
