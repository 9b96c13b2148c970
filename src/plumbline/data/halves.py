"""Halves of the training rows: one for the reward model, one for a judge that it cannot fool."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from plumbline.errors import DataError

Half = Literal[0, 1]
REWARD_MODEL_HALF: Half = 0
JUDGE_HALF: Half = 1

Row = Mapping[str, Any]


def half_of(prompt_id: str) -> Half:
    """The half that a prompt's rows belong to, decided by the prompt alone.

    The id is hashed again, with a salt: its own first bytes have decided between train and test
    (`splits.split_of`), so that among the training rows they are no longer evenly spread.
    """
    digest = hashlib.sha256(f"plumbline judge half {prompt_id}".encode()).digest()
    return 1 if digest[0] & 1 else 0


def take_half(rows: Iterable[Row], half: Half) -> list[Row]:
    """The rows of one half, in their order; each has a `prompt_id`.

    Raises:
        DataError: the half has no row.
    """
    every = list(rows)
    kept = [row for row in every if half_of(row["prompt_id"]) == half]
    if not kept:
        raise DataError(
            "evaluate.judge: expected training rows of several prompts, so that the reward model "
            f"and the judge get one half each, got {len(every)} rows that all fall into one half; "
            "add rows, or set evaluate.judge to false"
        )
    return kept
