"""Vocabulary sorted by its tokens' bytes: every byte prefix is one contiguous range of columns.

The columns of a sorted head are: N tokens that feed symbols, in byte order; then the tokens that mean END; then all
others (control tokens, unused slots, tokens with a 0xFF byte, padding rows of the head), which feed no symbol but count
in the softmax.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from pipeline.covering.trie import Trie
from schemas import END


def check_head_rows(width: int, token_bytes: Sequence[bytes | None]) -> None:
    """Raise ValueError if a model's head has fewer rows than its tokenizer has tokens."""
    if width < len(token_bytes):
        raise ValueError(
            f"the model's head has {width} rows, fewer than the tokenizer's {len(token_bytes)} tokens: they do not "
            "belong together. Give the tokenizer that the model was trained with."
        )


class Vocabulary:
    """Token bytes in sorted order, and the trie of their prefixes.

    Args:
        token_bytes: bytes by token id; None for a token that spells nothing.
        end_ids: tokens that mean END; they spell nothing, whatever `token_bytes` holds for them.
        width: rows of the model's head; ids from len(token_bytes) on are padding.
    Raises:
        ValueError: the head is narrower than the vocabulary, or an END id lies outside it.
    """

    def __init__(self, token_bytes: Sequence[bytes | None], end_ids: Sequence[int], width: int) -> None:
        check_head_rows(width, token_bytes)
        outside = [i for i in end_ids if not 0 <= i < width]
        if outside:
            raise ValueError(f"END tokens {outside} lie outside the head's {width} rows")
        ends = set(end_ids)
        spelling = [(b, i) for i, b in enumerate(token_bytes) if b and END not in b and i not in ends]
        spelling.sort()
        self.sorted_bytes: list[bytes] = [b for b, _ in spelling]
        ids = [i for _, i in spelling]
        others = sorted(set(range(width)) - ends - set(ids))
        self.num_text_tokens = len(ids)
        self.num_end = len(ends)
        self.end_ids = tuple(sorted(ends))
        self.lengths = np.array([len(b) for b in self.sorted_bytes], dtype=np.int64)
        self.longest = int(self.lengths.max(initial=0))
        self.order = np.array(ids + sorted(ends) + others, dtype=np.int64)  # column -> token id
        self.column = np.empty(width, dtype=np.int64)  # token id -> column
        self.column[self.order] = np.arange(width)

    @cached_property
    def trie(self) -> Trie:
        """Return the trie of its tokens' prefixes."""
        return Trie.of(self.sorted_bytes)
