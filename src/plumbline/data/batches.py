"""Splitting mini-batches by tokens."""

from bisect import bisect_left
from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Places of sequences in groups of at most `max_tokens` tokens each, like lengths together.

    A sequence that is longer stands alone. Packed groups are as few as can be, and then as small
    as can be: it is the largest that says how much memory they take.

    Args:
        lengths: of the sequences, tokens.
        max_tokens: of a group.
        packed: a group takes the sum of its lengths, not its longest length each.
    """
    # The longest first, which says how wide a padded group is.
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups = _fill(order, lengths, max_tokens, packed=packed)
    if not packed or len(groups) < 2:
        return groups
    limits = range(min(sum(lengths) // len(groups), max_tokens), max_tokens)
    fewest = len(groups)
    smallest = bisect_left(
        limits,
        True,
        key=lambda limit: len(_fill(order, lengths, limit, packed=True)) <= fewest,
    )
    return _fill(order, lengths, limits.start + smallest, packed=True)


def _fill(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, *, packed: bool
) -> list[list[int]]:
    """Groups in this order, each as full as it can be."""
    groups: list[list[int]] = []
    taken = 0
    for place in order:
        width = lengths[place] if packed or not groups else lengths[groups[-1][0]]
        if not groups or taken + width > max_tokens:
            groups.append([])
            taken, width = 0, lengths[place]
        groups[-1].append(place)
        taken += width
    return groups
