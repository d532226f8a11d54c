"""Grouping of sequences by similar length, so that padding costs little."""

from collections.abc import Sequence


def padded_groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return all indices, longest sequence first, in groups of at most `max_tokens` tokens.

    The tokens of a group include padding to its longest sequence. A sequence longer than `max_tokens` is a group by
    itself. Among sequences of equal length the earlier ones come first.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
