"""Pairs of responses to one prompt, as token ids, and what the two have in common."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

SIDES = ("chosen", "rejected")

Row = Mapping[str, Any]
"""`prompt`, `chosen` and `rejected`, each token ids."""


def pair_sequences(rows: Sequence[Row]) -> list[list[int]]:
    """Of each row its prompt with the chosen response, then its prompt with the rejected one."""
    return [[*row["prompt"], *row[side]] for row in rows for side in SIDES]


def pair_lengths(row: Row) -> list[int]:
    """Tokens of a row's two sequences."""
    return [len(row["prompt"]) + len(row[side]) for side in SIDES]


def shared_tokens(row: Row) -> int:
    """How many tokens both sequences of a row begin with: the prompt, and often a few more."""
    both = zip(row["chosen"], row["rejected"], strict=False)
    return len(row["prompt"]) + sum(1 for _ in takewhile(lambda two: two[0] == two[1], both))


def computed_tokens(row: Row, *, packed: bool) -> int:
    """Tokens that a model reads for a row.

    Packed, those that both begin with count once; else the shorter one's padding counts, too.
    """
    lengths = pair_lengths(row)
    return sum(lengths) - shared_tokens(row) if packed else 2 * max(lengths)
