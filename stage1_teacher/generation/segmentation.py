"""Segmentation: how many of the tokens that a model writes are its tokenizer's own encoding of what it writes.

Bytes do not say which tokens spell a text. A model trained on bytes alone may write runs of spaces, say, with other
tokens than its tokenizer would, which no figure per byte shows, and which its own next steps then read.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError

KINDS = ("white space", "words", "digits", "other")
Counts = dict[str, list[int]]  # by kind: tokens that are the tokenizer's own, all tokens


def kind_of(content: bytes) -> str:
    """Return the kind of a token: white space alone, letters or digits alone (white space around them), or other."""
    text = content.decode("utf-8", errors="replace")
    said = text.strip()
    if not said:
        return "white space"
    return "words" if said.isalpha() else "digits" if said.isdigit() else "other"


def count_own(before: bytes, tokens: Sequence[int], tokenizer: ByteTokenizer) -> Counts:
    """Count, by kind, the written tokens that are the tokenizer's own encoding of the whole text.

    A token is its own if the encoding has one of exactly the same bytes at the same place. Counting begins where the
    encoding has the first edge behind `before`, so that a word that the prompt cuts in two counts for nothing.

    Args:
        before: the text before the tokens; empty in a chat.
    Returns:
        Empty if the text cannot be encoded, as where it ends within a character.
    """
    spelled = [tokenizer.token_bytes[token] or b"" for token in tokens]
    text = before + b"".join(spelled)
    [encoded] = tokenizer.encode_batch([text], [tokenizer.prefix if before else b""])
    if isinstance(encoded, SpellingError):
        return {}
    num_prefix = len(tokenizer.prefix) if before else 0
    own_edges = [
        edge - num_prefix
        for edge in accumulate((len(tokenizer.token_bytes[token] or b"") for token in encoded), initial=0)
    ]
    own = set(pairwise(own_edges))
    first = min((edge for edge in own_edges if edge >= len(before)), default=len(text))
    counts: Counts = {}
    for content, (start, end) in zip(
        spelled, pairwise(accumulate(map(len, spelled), initial=len(before))), strict=True
    ):
        if start >= first:
            of_kind = counts.setdefault(kind_of(content), [0, 0])
            of_kind[0] += (start, end) in own
            of_kind[1] += 1
    return counts


def add_counts(total: Counts, more: Counts) -> None:
    """Add counts to others, in place."""
    for kind, (own, tokens) in more.items():
        of_kind = total.setdefault(kind, [0, 0])
        of_kind[0] += own
        of_kind[1] += tokens


def describe(counts: Counts) -> str:
    """Return the shares in one line: of all tokens, and of each kind."""
    own, tokens = (sum(of_kind[index] for of_kind in counts.values()) for index in (0, 1))
    if not tokens:
        return "no token written"
    kinds = ", ".join(f"{kind} {100 * counts[kind][0] / counts[kind][1]:.1f} %" for kind in KINDS if kind in counts)
    return f"{100 * own / tokens:.1f} % of {tokens:,} tokens ({kinds})"
