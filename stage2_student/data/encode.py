"""Records in the student's tokens, whole or in pieces: how many tokens, and the bytes that each covers.

Long records are cut as in `stage2_student.data.pieces`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.tokenization.chat_records import StoredChat, encode_by_turn, encode_whole, messages_of_segments
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from schemas.record import Record, RecordText
from stage2_student.data.align import with_segments
from stage2_student.data.examples import Encoded
from stage2_student.data.pieces import Cuttable, Piece, cut
from stage2_student.data.spans import supervised_tokens, token_spans

TOO_LONG = "longer than train.max_tokens"
UNSPELLABLE = "the student's tokenizer cannot spell it"
NOTHING = "no token of the student's lies in what the dump supervises"
# A part of plain text that is longer holds a whole token of any tokenizer: none has tokens of more than half of that.
_LONG_BYTES = 512


class Tokenizer(Protocol):
    """The part of `pipeline.tokenization.byte_tokenizer.ByteTokenizer` needed here."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    @property
    def prefix(self) -> bytes: ...
    @property
    def sha256(self) -> str: ...
    def encode_batch(self, documents: Sequence[bytes]) -> Sequence[list[int] | ValueError]: ...


class Spelled(NamedTuple):
    """A record in the student's tokens, with the fields of `Encoded`.

    `restarts` are the tokens that begin later messages of a chat.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    start: int | None = None
    turn_ends: Mapping[int, int] | None = None
    restarts: tuple[int, ...] = ()

    def encoded(self, record: Record, piece: Piece | None = None) -> Encoded:
        """Return the record, or a piece of it, with these tokens."""
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
    """Turns left out for one reason from chats that are otherwise used, and the bytes they supervise."""

    reason: str
    turns: int
    num_bytes: int


class Pieces(NamedTuple):
    """The counts of what is used of a record.

    Attributes:
        tokens: student tokens in each of its pieces, including start tokens.
        renderings: how often a chat is written, each time with other turns supervised; the pieces come rendering by
            rendering.
        left_out: turns of a chat that are not used.
        num_bytes: supervised bytes in each of its pieces, if they are counted.
    """

    tokens: tuple[int, ...]
    renderings: int = 1
    left_out: tuple[TurnsLeftOut, ...] = ()
    num_bytes: tuple[int, ...] = ()


def count_pieces(
    records: Sequence[RecordText | Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None,
    max_tokens: int | None,
    by_turn: bool = True,
    with_bytes: bool = False,
) -> Iterator[Pieces | str]:
    """Yield for each record the counts of its pieces, or the reason why it cannot be used.

    Args:
        max_tokens: None: a record is one piece, however long.
        by_turn: True: a chat's turns are used if the student's template writes them as they are stored; False: a chat
            is used whole or not at all.
        with_bytes: count the supervised bytes of pieces, too, which takes windows of documents and chats longer.
    Raises:
        ValueError: as `encode_records`.
    """
    for record, written in zip(records, _tokens(records, tokenizer, chat, by_turn), strict=True):
        if isinstance(written, str):
            yield written
            continue
        if isinstance(written, list) and (fault := _unsupervised(record, written, tokenizer)) is not None:
            yield fault
            continue
        tokens: list[int] = []
        num_bytes: list[int] = []
        for kept, read in _renderings(record, written):
            part = record if kept is None else with_segments(record, kept)
            if max_tokens is None or _num_tokens(read) <= max_tokens:
                tokens.append(_num_tokens(read))
                num_bytes += [_supervised_bytes(part, read, tokenizer)] if with_bytes else []
            else:
                spelled = _spelled(part, read, tokenizer)
                pieces = list(_pieces(part, spelled, max_tokens))
                tokens += [piece.num_tokens for piece in pieces]
                bytes_L = _bytes_of_tokens(part, spelled)
                num_bytes += [int(bytes_L[of.done : of.last].sum()) for of in pieces] if with_bytes else []
        if not tokens:
            yield NOTHING
        elif isinstance(written, StoredChat):
            yield Pieces(tuple(tokens), len(written.renderings), _left_out(record, written), tuple(num_bytes))
        else:
            yield Pieces(tuple(tokens), num_bytes=tuple(num_bytes))


def encode_pieces(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    chat: ChatTokenizer | None,
    max_tokens: int | None,
    by_turn: bool = True,
) -> Iterator[list[Encoded] | str]:
    """Yield the pieces that `count_pieces` counts, for each record, or the reason why it cannot be used."""
    for record, written in zip(records, _tokens(records, tokenizer, chat, by_turn), strict=True):
        if isinstance(written, str):
            yield written
            continue
        if isinstance(written, list) and (fault := _unsupervised(record, written, tokenizer)) is not None:
            yield fault
            continue
        encoded: list[Encoded] = []
        for kept, read in _renderings(record, written):
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
    """Encode each record whole, or return the reason why it is left out.

    Args:
        chat: the tokenizer with its chat template.
    Raises:
        ValueError: `chat` is None, and there is a chat among the records.
    """
    encoded = encode_pieces(records, tokenizer, chat, None, by_turn=False)
    whole = (pieces if isinstance(pieces, str) else pieces[0] for pieces in encoded)
    return [one if isinstance(one, str) or one.num_tokens <= max_tokens else TOO_LONG for one in whole]


def _supervised_bytes(record: RecordText | Record, read: list[int] | EncodedChat, tokenizer: Tokenizer) -> int:
    """Count the bytes of a whole record's tokens that are supervised."""
    if [(s.start, s.length) for s in record.segments] == [(0, len(record.document))]:
        return len(record.document)  # and the tokens are known to spell it
    return int(_bytes_of_tokens(record, _spelled(record, read, tokenizer)).sum())


def _bytes_of_tokens(record: RecordText | Record, spelled: Spelled) -> np.ndarray:
    """Return L, int64: the bytes of each token; 0 for one that is not supervised."""
    is_supervised = supervised_tokens(spelled.starts, spelled.ends, record.segments)
    bytes_L: np.ndarray = np.where(is_supervised, spelled.ends - spelled.starts, 0)
    return bytes_L


def _pieces(record: RecordText | Record, spelled: Spelled, max_tokens: int) -> Iterator[Piece]:
    lengths = record.teacher_token_lengths
    teacher_ends = np.append(0, np.cumsum(lengths)) if len(lengths) else None
    used = _used(record, spelled)
    cuttable = Cuttable(record.document, spelled.starts, spelled.ends, used, teacher_ends, spelled.restarts)
    return cut(cuttable, max_tokens)


def _used(record: RecordText | Record, spelled: Spelled) -> np.ndarray:
    """Return L, bool: True for tokens that are supervised, or followed by a supervised END.

    In a chat, the END is a token that the template writes, and that token is the one returned.
    """
    starts, ends = spelled.starts, spelled.ends
    used = supervised_tokens(starts, ends, record.segments)
    stops = {segment.start + segment.length for segment in record.segments if segment.has_end}
    if spelled.turn_ends is None:
        used[np.isin(ends, list(stops)) & (ends > starts)] = True
    else:
        used &= ends > starts
        used[[token for offset, token in spelled.turn_ends.items() if offset in stops]] = True
    return used


def _unsupervised(record: RecordText | Record, written: list[int], tokenizer: Tokenizer) -> str | None:
    """Return why plain text gives nothing to learn; None if it does."""
    if not record.segments:
        return NOTHING
    last = record.segments[-1]
    is_whole = len(record.segments) == 1 and last.start + last.length == len(record.document)  # or from some byte on
    if is_whole or max(segment.length for segment in record.segments) > _LONG_BYTES:
        return None
    return None if _used(record, _spelled(record, written, tokenizer)).any() else NOTHING


def _num_tokens(written: list[int] | EncodedChat) -> int:
    """Count the tokens, including the start token; a chat's tokens begin with their own."""
    return len(written.tokens) if isinstance(written, EncodedChat) else len(written) + 1


def _renderings(
    record: RecordText | Record, written: list[int] | StoredChat
) -> Iterator[tuple[list[bool] | None, list[int] | EncodedChat]]:
    """Yield what the student reads of a record: its tokens, or those of each rendering of a chat.

    Each comes with the segments supervised there; None means all.
    """
    if not isinstance(written, StoredChat):
        yield None, written
    elif written.is_whole:
        yield None, written.renderings[0]
    else:
        numbers = messages_of_segments(record)
        for rendering in written.renderings:
            messages = {turn.message for turn in rendering.turns}
            yield [number in messages for number in numbers], rendering


def _left_out(record: RecordText | Record, chat: StoredChat) -> tuple[TurnsLeftOut, ...]:
    num_bytes: Counter[int] = Counter()
    for number, segment in zip(messages_of_segments(record), record.segments, strict=True):
        num_bytes[number] += segment.length
    reasons = {number: _reason(fault) for number, fault in chat.left_out.items()}
    return tuple(
        TurnsLeftOut(reason, count, sum(num_bytes[n] for n, why in reasons.items() if why == reason))
        for reason, count in Counter(reasons.values()).items()
    )


def _tokens(
    records: Sequence[RecordText | Record], tokenizer: Tokenizer, chat: ChatTokenizer | None, by_turn: bool
) -> list[list[int] | StoredChat | str]:
    plain = [record for record in records if not record.message_roles]
    ids_of_plain = iter(tokenizer.encode_batch([record.document for record in plain]))
    chats = [record for record in records if record.message_roles]
    if chats and chat is None:
        raise ValueError(
            f"the dump holds chats (document {chats[0].doc_id!r}), but the student has no chat template; "
            "give student.chat_template"
        )
    of_chats = iter(_chats(chats, chat, by_turn) if chat is not None else [])
    written = [next(of_chats) if record.message_roles else next(ids_of_plain) for record in records]
    return [_reason(one) if isinstance(one, ValueError) else one for one in written]


def _chats(chats: Sequence[RecordText | Record], chat: ChatTokenizer, by_turn: bool) -> list[StoredChat | ValueError]:
    if by_turn:
        return encode_by_turn(chat, chats)
    return [one if isinstance(one, ValueError) else StoredChat((one,), {}) for one in encode_whole(chat, chats)]


def _reason(fault: ValueError) -> str:
    return fault.reason if isinstance(fault, ChatError) else UNSPELLABLE


def _spelled(record: RecordText | Record, written: list[int] | EncodedChat, tokenizer: Tokenizer) -> Spelled:
    if isinstance(written, EncodedChat):
        return _spelled_chat(written, tokenizer)
    spans = token_spans([tokenizer.token_bytes[i] or b"" for i in written], record.document, tokenizer.prefix)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    ends = np.array([span.stop for span in spans], dtype=np.int64)
    return Spelled(np.array(written, dtype=np.int64), starts, ends)


def _spelled_chat(chat: EncodedChat, tokenizer: Tokenizer) -> Spelled:
    """Return a chat's tokens and the bytes they cover; its first token is the start token.

    Tokens outside turns cover nothing: one that ends a turn is placed at the turn's end, others at the next turn's
    start.
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
    """Yield the tokens, numbered after the first, where a piece may begin like a chat of its own.

    The chat's first token is put before such a piece. If the template writes that token before each message, the piece
    begins after it.
    """
    for before, after in pairwise(chat.turns):
        begin = before.last + (before.end_token is not None)
        marks = [i for i in range(begin, after.first) if chat.tokens[i] == chat.tokens[0]]
        yield marks[0] if marks else begin - 1
