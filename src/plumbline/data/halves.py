"""Halves of the training rows: one for the reward model, one for a judge that it cannot fool."""

import hashlib
from typing import Literal

from datasets import Dataset

from plumbline.errors import DataError

Half = Literal[0, 1]
REWARD_MODEL_HALF: Half = 0
JUDGE_HALF: Half = 1


def half_of(prompt_id: str) -> Half:
    """The half that a prompt's rows belong to, decided by the prompt alone.

    The id is hashed again, with a salt: its own first bytes have decided between train and test
    (`splits.split_of`), so that among the training rows they are no longer evenly spread.
    """
    digest = hashlib.sha256(f"plumbline judge half {prompt_id}".encode()).digest()
    return 1 if digest[0] & 1 else 0


def take_half(rows: Dataset, half: Half) -> Dataset:
    """The rows of one half, in their order; `rows` need a column `prompt_id`.

    Raises:
        DataError: the half has no row.
    """
    kept = [index for index, prompt in enumerate(rows["prompt_id"]) if half_of(prompt) == half]
    if not kept:
        raise DataError(
            "evaluate.judge: expected training rows of at least two prompts, so that the reward "
            f"model and the judge get one half each, got {len(rows)} rows that all fall into one "
            "half; add rows, or set evaluate.judge to false"
        )
    return rows.select(kept)
