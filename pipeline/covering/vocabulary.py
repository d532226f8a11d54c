"""A vocabulary sorted by its tokens' bytes: every byte prefix is one contiguous range of columns.

The columns of a sorted head are: N tokens that feed symbols, in byte order; then the tokens that mean END; then all others
(control tokens, unused slots, tokens that hold a 0xFF byte, padding rows of the head), which feed nothing but count in the softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from schemas import END


@dataclass(frozen=True)
class Node:
    """A byte prefix `x` that at least one token starts with.

    `cuts` are ascending columns. Each of the first `num_exact` intervals holds one token that spells exactly `x`; each further
    interval holds the tokens that go on with one symbol of `symbols`. Intervals are never empty.
    """

    cuts: np.ndarray  # int64, intervals + 1
    symbols: np.ndarray  # uint8, one for each interval after the exact ones
    num_exact: int
    labels: np.ndarray = field(
        compare=False, repr=False
    )  # int64, one for each interval: its symbol; 0 for the exact ones
    children: dict[int, "Node"] = field(default_factory=dict, compare=False, repr=False)


def check_head_rows(width: int, token_bytes: Sequence[bytes | None]) -> None:
    """Raise ValueError where a model's head has fewer rows than its tokenizer has tokens."""
    if width < len(token_bytes):
        raise ValueError(
            f"the model's head has {width} rows, fewer than the tokenizer's {len(token_bytes)} tokens: they do not belong together. "
            "Give the tokenizer that the model was trained with."
        )


class Vocabulary:
    """Token bytes in sorted order, and the ranges of their prefixes.

    Args:
        token_bytes: bytes by token id; None for a token that spells nothing.
        end_ids: tokens that mean END; they spell nothing, whatever `token_bytes` says of them.
        width: rows of the model's head; ids from len(token_bytes) on are padding.
    Raises:
        ValueError: the head is narrower than the vocabulary, or an END id lies outside of it.
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
        self.num_spelling = len(ids)
        self.num_end = len(ends)
        self.end_ids = tuple(sorted(ends))
        self.longest = max(map(len, self.sorted_bytes), default=0)
        self.order = np.array(ids + sorted(ends) + others, dtype=np.int64)  # column -> token id
        self.column = np.empty(width, dtype=np.int64)  # token id -> column
        self.column[self.order] = np.arange(width)
        self._flat = np.frombuffer(b"".join(self.sorted_bytes), dtype=np.uint8)
        self._starts = np.concatenate([[0], np.cumsum([len(b) for b in self.sorted_bytes])]).astype(np.int64)
        self.root = self._node(0, self.num_spelling, 0)

    def _node(self, low: int, high: int, depth: int) -> Node:
        longer = low  # tokens that spell exactly this prefix sort before all longer ones
        while longer < high and len(self.sorted_bytes[longer]) == depth:
            longer += 1
        next_bytes = self._flat[self._starts[longer:high] + depth]
        edges = np.flatnonzero(np.diff(next_bytes)) + 1
        starts = longer + np.concatenate([[0], edges]) if high > longer else np.empty(0)
        cuts = np.concatenate([np.arange(low, longer), starts, [high]]).astype(np.int64)
        symbols = next_bytes[np.concatenate([[0], edges])] if high > longer else next_bytes
        num_exact = longer - low
        return Node(cuts, symbols, num_exact, np.concatenate([[0] * num_exact, symbols]).astype(np.int64))

    def child(self, node: Node, symbol: int, depth: int) -> Node | None:
        """The node of `x + symbol`, where `node` is that of `x`, `depth` bytes long; None where no token goes on so."""
        found = node.children.get(symbol)
        if found is None:
            at = int(np.searchsorted(node.symbols, symbol))
            if at == len(node.symbols) or node.symbols[at] != symbol:
                return None
            at += node.num_exact
            found = self._node(int(node.cuts[at]), int(node.cuts[at + 1]), depth + 1)
            node.children[symbol] = found
        return found
