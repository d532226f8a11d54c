"""Sequences of like length together, so that padding costs little."""

from collections.abc import Sequence


def padded_groups(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Return all indices, the longest sequence's first, in groups of at most `most_tokens` tokens, padding to a group's
    longest included.

    One that is longer than that is a group by itself; of those that are equally long the earlier ones come first.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
