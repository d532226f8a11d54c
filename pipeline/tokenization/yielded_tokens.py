"""Reachable tokens: those that a tokenizer yields for some text. A vocabulary holds more.

SentencePiece with byte fallback spells each single character of its vocabulary twice, as `.` and as `<0x2E>`, and
yields only the first; Qwen's split pattern cuts 1,673 of its own tokens in two. Such a token is unreachable: no text
contains it, and no model has learnt it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Protocol

import numpy as np

# Text that a token may need beside it to be yielded, depending on how a tokenizer splits text.
_CONTEXTS = tuple(pair for beside in (b"a", b" ", b"\n", b".") for pair in ((beside, b""), (b"", beside)))
_LEADS = {1: range(0xC2, 0xE0), 2: range(0xE0, 0xF0), 3: range(0xF0, 0xF5)}  # by the bytes that follow in the character
_CONTINUATIONS = range(0x80, 0xC0)
_MAX_COMPLETIONS = 4096  # per token: the number of three-byte characters that share a first byte
_AT_ONCE = 64
_STRIDE = 7919  # prime, and so coprime to 64 and to the numbers of leads


class Tokenizing(Protocol):
    """The parts of `pipeline.tokenization.byte_tokenizer.ByteTokenizer` that are used here."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    def encode_batch(
        self, documents: Sequence[bytes], prefixes: Sequence[bytes] | None = None
    ) -> Sequence[list[int] | ValueError]: ...


def reachable(tokenizer: Tokenizing) -> np.ndarray:
    """Find the tokens that some text has in its encoding: bool by id, False for a token that spells nothing.

    A token that is text is searched for in the encoding of its own bytes, alone and beside a letter, a space, a line
    break and a full stop, without the dummy prefix, as in the middle of a text. How a tokenizer merges inside a token
    does not depend on what is beside it. A token that holds part of a character is searched for in 4,096 characters
    with that part, or in all if there are fewer.
    """
    found_V = np.zeros(len(tokenizer.token_bytes), dtype=bool)
    spelling = [(token, spelled) for token, spelled in enumerate(tokenizer.token_bytes) if spelled]
    text = [(token, spelled) for token, spelled in spelling if _is_text(spelled)]
    for before, after in ((b"", b""), *_CONTEXTS):
        _mark(tokenizer, [before + spelled + after for token, spelled in text if not found_V[token]], found_V)
    completed = {token: completions(spelled) for token, spelled in spelling if not _is_text(spelled)}
    while completed:
        texts = {token: list(islice(more, _AT_ONCE)) for token, more in completed.items()}
        _mark(tokenizer, [text for found in texts.values() for text in found], found_V)
        completed = {token: completed[token] for token, found in texts.items() if found and not found_V[token]}
    return found_V


def completions(spelled: bytes) -> Iterator[bytes]:
    """Yield texts that hold these bytes, completing a character at either end; none if no text can hold them."""
    head = next((i for i, byte in enumerate(spelled) if byte not in _CONTINUATIONS), len(spelled))
    rest = spelled[head:]
    tail = next((n for n in range(1, min(3, len(rest)) + 1) if rest[-n] >= 0xC0), 0)
    tail = 0 if _is_text(rest[-tail:]) else tail
    body, start = rest[: len(rest) - tail], rest[len(rest) - tail :]
    if head > 3 or not _is_text(body):
        return
    fronts = islice(_fronts(spelled[:head]), _MAX_COMPLETIONS)
    backs = islice(_backs(start), _MAX_COMPLETIONS)
    if head and tail:  # not every pair: such tokens are rare, and pairs are many
        yield from (front + body + back for front, back in zip(fronts, cycle(list(backs)), strict=False))
    elif head:
        yield from (front + body for front in fronts)
    elif tail:
        yield from (body + back for back in backs)
    else:
        yield body


def _fronts(end: bytes) -> Iterator[bytes]:
    """Yield characters that end with these continuation bytes, short ones first."""
    for following, leads in _LEADS.items():
        if following >= len(end):
            starts = _in_no_order(leads, *[_CONTINUATIONS] * (following - len(end)))
            yield from (start + end for start in starts if _is_text(start + end))


def _backs(start: bytes) -> Iterator[bytes]:
    """Yield characters that start with these bytes: a lead byte, then continuation bytes."""
    following = next((n for n, leads in _LEADS.items() if start[0] in leads), 0)
    if following >= len(start):
        ends = _in_no_order(*[_CONTINUATIONS] * (following + 1 - len(start)))
        yield from (start + end for end in ends if _is_text(start + end))


def _in_no_order(*choices: Sequence[int]) -> Iterator[bytes]:
    """Yield all combinations of one byte per choice, scattered: neighbours are often merged alike."""
    count = math.prod(map(len, choices))
    for turn in range(count):
        at, chosen = turn * _STRIDE % count, []
        for choice in choices:
            at, which = divmod(at, len(choice))
            chosen.append(choice[which])
        yield bytes(chosen)


def _mark(tokenizer: Tokenizing, texts: Sequence[bytes], found_V: np.ndarray) -> None:
    """Set the ids that occur in the encodings of these texts; a text that cannot be spelled has none."""
    for ids in tokenizer.encode_batch(texts, [b""] * len(texts)):
        if not isinstance(ids, ValueError):
            found_V[ids] = True


def _is_text(spelled: bytes) -> bool:
    try:
        spelled.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
