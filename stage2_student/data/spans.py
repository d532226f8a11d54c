"""Exact byte spans of the student's tokens in a document."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from schemas.record import Segment


def token_spans(tokens: Sequence[bytes], document: bytes, prefix: bytes = b"") -> list[range]:
    """Return the byte range in `document` of each token.

    Args:
        tokens: the bytes of each token in turn; together they spell `prefix + document`.
        prefix: bytes that the tokenizer puts before a document (SentencePiece: a space). They are cut off the spans; a
            token with nothing else has an empty span.
    Raises:
        ValueError: the tokens spell something else.
    """
    spelled = b"".join(tokens)
    if spelled != prefix + document:
        raise ValueError(
            f"tokens spell {len(spelled)} bytes that differ from the prefix {prefix!r} and the document's "
            f"{len(document)} bytes; leave the document out, or use a tokenizer without a normaliser"
        )
    ends = [max(0, end - len(prefix)) for end in accumulate(map(len, tokens))]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def supervised_tokens(starts: np.ndarray, ends: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Return one bool per token: True if it is wholly inside one supervised segment.

    A token that also covers bytes outside (a word that shares a token with a chat template) is not supervised. A token
    without bytes (only prefix) belongs to the segment that starts where it is.
    """
    inside = np.zeros(len(starts), dtype=bool)
    for segment in segments:
        end = segment.start + segment.length
        inside |= (starts >= segment.start) & (ends <= end) & ((starts < end) | (segment.length == 0))
    return inside
