"""Records in the student's tokens: how many, and which bytes each of them covers; whole, or in pieces (see
`stage2_student.data.pieces`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.tokenization.chat_records import StoredChat, encode_by_turn, encode_whole, messages_of_segments
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from schemas.record import Question, Record
from stage2_student.data.align import with_segments
from stage2_student.data.examples import Encoded
from stage2_student.data.pieces import Cuttable, Piece, cut
from stage2_student.data.spans import supervised_tokens, token_spans

TOO_LONG = "longer than train.max_tokens"
UNSPELLABLE = "the student's tokenizer cannot spell it"
NOTHING = "no token of the student's lies in what the dump supervises"


class Tokenizer(Protocol):
    """What is needed of `pipeline.tokenization.byte_tokenizer.ByteTokenizer`."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    @property
    def prefix(self) -> bytes: ...
    @property
    def sha256(self) -> str: ...
    def encode_batch(self, documents: Sequence[bytes]) -> Sequence[list[int] | ValueError]: ...


class Spelled(NamedTuple):
    """A record in the student's tokens, as `Encoded` has it; `restarts` are tokens that later messages of a chat begin
    with.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    start: int | None = None
    turn_ends: Mapping[int, int] | None = None
    restarts: tuple[int, ...] = ()

    def encoded(self, record: Record, piece: Piece | None = None) -> Encoded:
        """The record, or a piece of it."""
        if piece is None:
            return Encoded(record, self.tokens, self.starts, self.ends, self.start, self.turn_ends)
        first, done, last = piece
        inside = slice(first, last)
        ends = self.turn_ends
        if ends is not None:
            ends = {offset: token - first for offset, token in ends.items() if done <= token < last}
        of_piece = (self.tokens[inside], self.starts[inside], self.ends[inside], self.start, ends)
        return Encoded(record, *of_piece, num_context=done - first)


class TurnsLeftOut(NamedTuple):
    """Turns of a chat that are left out for one reason while others of it are used, and the bytes that they
    supervise.
    """

    reason: str
    turns: int
    num_bytes: int


class Pieces(NamedTuple):
    """What of a record is used.

    Attributes:
        tokens: the student's, in each of its pieces, start tokens included.
        renderings: of a chat, how often it is written, each time with other turns supervised; the pieces are of these
            in turn.
        left_out: of a chat, turns of it that are not.
    """

    tokens: tuple[int, ...]
    renderings: int = 1
    left_out: tuple[TurnsLeftOut, ...] = ()


def count_pieces(
    asked: Sequence[Question | Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None,
    max_tokens: int | None,
    by_turn: bool = True,
) -> Iterator[Pieces | str]:
    """Of each record what is used of it, or the reason why it cannot be.

    Args:
        max_tokens: None: a record is one piece, however long.
        by_turn: of a chat those turns are used that the student's template writes as they are stored; False: it is used
            whole, or not.
    Raises:
        ValueError: as `encode_records`.
    """
    for record, found in zip(asked, _tokens(asked, tokenizer, chat, by_turn), strict=True):
        if isinstance(found, str):
            yield found
            continue
        tokens: list[int] = []
        for kept, read in _renderings(record, found):
            part = record if kept is None else with_segments(record, kept)
            if max_tokens is None or _num_tokens(read) <= max_tokens:
                tokens.append(_num_tokens(read))
            else:
                tokens += [piece.num_tokens for piece in _pieces(part, _spelled(part, read, tokenizer), max_tokens)]
        if not tokens:
            yield NOTHING
        elif isinstance(found, StoredChat):
            yield Pieces(tuple(tokens), len(found.renderings), _left_out(record, found))
        else:
            yield Pieces(tuple(tokens))


def encode_pieces(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None,
    max_tokens: int | None,
    by_turn: bool = True,
) -> Iterator[list[Encoded] | str]:
    """The pieces that `count_pieces` counts."""
    for record, found in zip(records, _tokens(records, tokenizer, chat, by_turn), strict=True):
        if isinstance(found, str):
            yield found
            continue
        encoded: list[Encoded] = []
        for kept, read in _renderings(record, found):
            part = record if kept is None else with_segments(record, kept)
            spelled = _spelled(part, read, tokenizer)
            if max_tokens is None or _num_tokens(read) <= max_tokens:
                encoded.append(spelled.encoded(part))
            else:
                encoded += [spelled.encoded(part, piece) for piece in _pieces(part, spelled, max_tokens)]
        yield encoded or NOTHING


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, max_tokens: int, chat: ChatTokenizer | None = None
) -> list[Encoded | str]:
    """Each record whole, or the reason why it is left out.

    Args:
        chat: the tokenizer with its chat template. ValueError where it is None and there is a chat among the records.
    """
    encoded = encode_pieces(records, tokenizer, chat, None, by_turn=False)
    found = (pieces if isinstance(pieces, str) else pieces[0] for pieces in encoded)
    return [one if isinstance(one, str) or one.num_tokens <= max_tokens else TOO_LONG for one in found]


def _pieces(asked: Question | Record, spelled: Spelled, max_tokens: int) -> Iterator[Piece]:
    theirs = np.append(0, np.cumsum(asked.teacher_token_lengths)) if len(asked.teacher_token_lengths) else None
    record = Cuttable(asked.document, spelled.starts, spelled.ends, _used(asked, spelled), theirs, spelled.restarts)
    return cut(record, max_tokens)


def _used(asked: Question | Record, spelled: Spelled) -> np.ndarray:
    """Bool per token: it is supervised, or an END is that follows it; in a chat, that it stands for."""
    starts, ends = spelled.starts, spelled.ends
    used = supervised_tokens(starts, ends, asked.segments)
    stops = {segment.start + segment.length for segment in asked.segments if segment.has_end}
    if spelled.turn_ends is None:
        used[np.isin(ends, list(stops)) & (ends > starts)] = True
    else:
        used &= ends > starts
        used[[token for offset, token in spelled.turn_ends.items() if offset in stops]] = True
    return used


def _num_tokens(found: list[int] | EncodedChat) -> int:
    """With the start token; that of a chat is one of its own."""
    return len(found.tokens) if isinstance(found, EncodedChat) else len(found) + 1


def _renderings(
    asked: Question | Record, found: list[int] | StoredChat
) -> Iterator[tuple[list[bool] | None, list[int] | EncodedChat]]:
    """What is read of a record: its tokens, or those of each rendering of a chat, with the segments that are supervised
    there; None: all.
    """
    if not isinstance(found, StoredChat):
        yield None, found
    elif found.is_whole:
        yield None, found.renderings[0]
    else:
        numbers = messages_of_segments(asked)
        for rendering in found.renderings:
            spoken = {turn.message for turn in rendering.turns}
            yield [number in spoken for number in numbers], rendering


def _left_out(asked: Question | Record, found: StoredChat) -> tuple[TurnsLeftOut, ...]:
    num_bytes: Counter[int] = Counter()
    for number, segment in zip(messages_of_segments(asked), asked.segments, strict=True):
        num_bytes[number] += segment.length
    reasons = {number: _reason(fault) for number, fault in found.left_out.items()}
    return tuple(
        TurnsLeftOut(reason, count, sum(num_bytes[n] for n, why in reasons.items() if why == reason))
        for reason, count in Counter(reasons.values()).items()
    )


def _tokens(
    asked: Sequence[Question | Record], tokenizer: Tokenizer, chat: ChatTokenizer | None, by_turn: bool
) -> list[list[int] | StoredChat | str]:
    plain = [record for record in asked if not record.message_roles]
    ids_of_plain = iter(tokenizer.encode_batch([record.document for record in plain]))
    chats = [record for record in asked if record.message_roles]
    if chats and chat is None:
        raise ValueError(
            f"the dump holds chats (document {chats[0].doc_id!r}), and the student has no chat template; give student.chat_template"
        )
    of_chats = iter(_chats(chats, chat, by_turn) if chat is not None else [])
    found = [next(of_chats) if record.message_roles else next(ids_of_plain) for record in asked]
    return [_reason(one) if isinstance(one, ValueError) else one for one in found]


def _chats(chats: Sequence[Question | Record], chat: ChatTokenizer, by_turn: bool) -> list[StoredChat | ValueError]:
    if by_turn:
        return encode_by_turn(chat, chats)
    return [one if isinstance(one, ValueError) else StoredChat((one,), {}) for one in encode_whole(chat, chats)]


def _reason(fault: ValueError) -> str:
    return fault.reason if isinstance(fault, ChatError) else UNSPELLABLE


def _spelled(asked: Question | Record, found: list[int] | EncodedChat, tokenizer: Tokenizer) -> Spelled:
    if isinstance(found, EncodedChat):
        return _spelled_chat(found, tokenizer)
    spans = token_spans([tokenizer.token_bytes[i] or b"" for i in found], asked.document, tokenizer.prefix)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    ends = np.array([span.stop for span in spans], dtype=np.int64)
    return Spelled(np.array(found, dtype=np.int64), starts, ends)


def _spelled_chat(chat: EncodedChat, tokenizer: Tokenizer) -> Spelled:
    """A chat's tokens and the bytes they cover; its first token is the start. Tokens outside turns stand empty: what
    ends a turn at its end, others where the next turn starts.
    """
    starts = np.full(len(chat.tokens), chat.turns[0].start, dtype=np.int64)
    ends = starts.copy()
    for turn, after in zip_longest(chat.turns, chat.turns[1:]):
        sizes = [len(tokenizer.token_bytes[token] or b"") for token in chat.tokens[turn.first : turn.last]]
        edges = np.maximum(turn.start - len(turn.prefix) + np.cumsum([0, *sizes]), turn.start)
        starts[turn.first : turn.last], ends[turn.first : turn.last] = edges[:-1], edges[1:]
        starts[turn.last : turn.last + 1] = ends[turn.last : turn.last + 1] = turn.end
        if after is not None:
            starts[turn.last + 1 :] = ends[turn.last + 1 :] = after.start
    return Spelled(
        np.array(chat.tokens[1:], dtype=np.int64),
        starts[1:],
        ends[1:],
        start=chat.tokens[0],
        turn_ends={turn.end: turn.last - 1 for turn in chat.turns if turn.end_token is not None},
        restarts=tuple(_restarts(chat)),
    )


def _restarts(chat: EncodedChat) -> Iterator[int]:
    """Where a piece may begin like a chat of its own, the chat's first token put before: of the tokens after that one,
    which.

    Where the template writes its first token before each message, that is put before already.
    """
    for before, after in pairwise(chat.turns):
        begin = before.last + (before.end_token is not None)
        marks = [i for i in range(begin, after.first) if chat.tokens[i] == chat.tokens[0]]
        yield marks[0] if marks else begin - 1
