"""Documents in a model's tokens, with the bytes that each token covers, and the bytes that several models share.

A token that holds bytes of both the assistant and the chat template is not the assistant's. So two models may not
supervise the same bytes of a chat; they can be compared on the text between token ends that all of them share.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.corpus.regions import ChatParts, TextParts
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_template import ChatError, Message
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from pipeline.tokenization.conversation import Excerpt

# A document, or parts of one; a chat, or some of its turns, or one turn with the messages before it.
Text = bytes | TextParts | Sequence[Message] | ChatParts | Excerpt
Span = tuple[int, int]  # bytes `start .. end` of a document, or of a chat's joined message contents

UNSPELLABLE = "the tokenizer cannot spell it"
NO_TURN = "no token holds only what is supervised of the chat"


class TextTokens(NamedTuple):
    """Consecutive tokens that spell bytes of the document and nothing else.

    Token `first + k` covers bytes `edges[k] .. edges[k + 1]`.
    """

    first: int
    edges: list[int]

    @property
    def span(self) -> Span:
        return self.edges[0], self.edges[-1]


class Spelled(NamedTuple):
    """A document in a model's tokens, starting with its start token.

    Attributes:
        restarts: in a chat, tokens at which a later message begins; a text that starts there begins like a chat of its
            own.
        repeats_start: True: the first token must be put before a text that starts there; False: it is already there.
        contents: for a turn of a chat, the bytes that the spans refer to, as this model's template writes them.
    """

    tokens: list[int]
    text_tokens: tuple[TextTokens, ...]
    restarts: tuple[int, ...] = ()
    repeats_start: bool = True
    contents: bytes = b""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Bytes that its tokens can be scored on."""
        return tuple(run.span for run in self.text_tokens)

    def token_bytes(self, spans: Sequence[Span]) -> np.ndarray:
        """Return L: the bytes of each token inside the spans; -1 for other tokens.

        Each span begins and ends at a token edge.
        """
        sizes_L = np.full(len(self.tokens), -1, dtype=np.int64)
        for first, edges in self.text_tokens:
            for start, end in spans:
                if edges[0] <= start < end <= edges[-1]:
                    # The first of equal edges: a tokenizer's prefix may be a token without bytes.
                    low, high = bisect_left(edges, start), bisect_left(edges, end)
                    assert edges[low] == start and edges[high] == end
                    sizes_L[first + low : first + high] = np.diff(edges[low : high + 1])
        return sizes_L


def spell(
    documents: Sequence[Text], tokenizer: ByteTokenizer, start_id: int, chat: ChatTokenizer | None = None
) -> Iterator[Spelled | str]:
    """Yield each document in the model's tokens, or the reason why it cannot be spelled.

    A chat is rendered by `chat`, which writes its own start token.
    """
    plain = [one.text if isinstance(one, TextParts) else one for one in documents if isinstance(one, bytes | TextParts)]
    texts = iter(tokenizer.encode_batch(plain))
    for document in documents:
        if not isinstance(document, bytes | TextParts):
            assert chat is not None
            [encoded] = chat.encode_batch([document.messages if isinstance(document, ChatParts) else document])
            if isinstance(document, ChatParts) and isinstance(encoded, EncodedChat):
                turns = tuple(turn for turn in encoded.turns if turn.message in document.turns)
                encoded = replace(encoded, turns=turns) if turns else ChatError(NO_TURN)
            spelled = _spelled_chat(encoded, tokenizer)
            if isinstance(document, Excerpt) and isinstance(spelled, Spelled) and isinstance(encoded, EncodedChat):
                spelled = spelled._replace(contents=b"".join(encoded.contents))
            yield spelled
            continue
        ids = next(texts)
        if isinstance(ids, ValueError):
            yield UNSPELLABLE
        else:
            edges = token_edges(ids, tokenizer)
            spans = ((0, edges[-1]),) if isinstance(document, bytes) else document.spans
            yield Spelled([start_id, *ids], tuple(_inside(edges, spans)))


def _inside(edges: list[int], spans: Sequence[Span]) -> Iterator[TextTokens]:
    """Yield the tokens that lie inside each span; `edges` are those of all tokens after the start token."""
    for start, end in spans:
        first, last = bisect_left(edges, start), bisect_right(edges, end) - 1
        if first < last:
            yield TextTokens(1 + first, edges[first : last + 1])


def _spelled_chat(encoded: EncodedChat | ValueError, tokenizer: ByteTokenizer) -> Spelled | str:
    if isinstance(encoded, ChatError):
        return encoded.reason
    if isinstance(encoded, ValueError):
        return UNSPELLABLE
    tokens, turns = encoded.tokens, encoded.turns
    text_tokens = tuple(
        TextTokens(turn.first, token_edges(tokens[turn.first : turn.last], tokenizer, turn.start, len(turn.prefix)))
        for turn in turns
    )
    return Spelled(tokens, text_tokens, *restarts_of(encoded))


def restarts_of(encoded: EncodedChat) -> tuple[tuple[int, ...], bool]:
    """Return where later messages of a chat begin, and whether a text starting there needs the first token before it.

    The next message begins after the token that ends a turn; if the template writes the chat's first token before each
    message, it begins there, and that token is not needed.
    """
    tokens, turns = encoded.tokens, encoded.turns
    if all(tokens[0] in tokens[a.last + 1 : b.first] for a, b in pairwise(turns)):
        return tuple(tokens.index(tokens[0], a.last + 1) for a in turns[:-1]), False
    return tuple(a.last + (a.end_token is not None) for a in turns[:-1]), True


def token_edges(
    ids: Sequence[int], tokenizer: ByteTokenizer, start: int = 0, num_prefix: int | None = None
) -> list[int]:
    """Return where tokens begin and end, from byte `start` on: one edge more than tokens.

    The bytes that the tokenizer puts before them cover nothing.
    """
    sizes = [len(tokenizer.token_bytes[token] or b"") for token in ids]
    before = len(tokenizer.prefix) if num_prefix is None else num_prefix
    edges = np.maximum(start - before + np.cumsum([0, *sizes]), start)
    return [int(edge) for edge in edges]


def common_spans(spelled: Sequence[Spelled]) -> tuple[Span, ...]:
    """Return the bytes that all of these can be scored on.

    They are spans that begin and end where all of them have a token edge.
    """
    common = spelled[0].spans
    if all(other.spans == common for other in spelled[1:]):
        return common
    edges_of_all = set.intersection(*({e for run in one.text_tokens for e in run.edges} for one in spelled))
    for other in spelled[1:]:
        overlaps = ((max(a, c), min(b, d)) for a, b in common for c, d in other.spans)
        common = tuple((start, end) for start, end in overlaps if start < end)
    spans = []
    for start, end in common:
        edges = [edge for edge in edges_of_all if start <= edge <= end]
        if edges and min(edges) < max(edges):
            spans.append((min(edges), max(edges)))
    return tuple(spans)
