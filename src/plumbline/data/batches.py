"""Splitting mini-batches by tokens."""

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Places of sequences in groups of at most `max_tokens` tokens each, like lengths together.

    A sequence that is longer stands alone.

    Args:
        lengths: of the sequences, tokens.
        max_tokens: of a group.
        packed: a group takes the sum of its lengths, not its longest length each.
    """
    # The longest first, which says how wide a padded group is.
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
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
