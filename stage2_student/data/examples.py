"""Training examples: the tokens and bytes of a record that are supervised, by exact byte offsets.

Shape legend: L tokens (including the start token), P supervised byte positions, E maximum number of entries stored at
one position.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from schemas import END
from schemas.record import Record
from stage2_student.data.spans import supervised_tokens

NO_SYMBOL = -1  # pads a position's entries

NO_LABEL = -100
NO_ROW = -1


@dataclass(frozen=True)
class Masks:
    """Limits on a position's measures; positions above them contribute no KL."""

    max_doubt: float
    max_token_end: float


@dataclass(frozen=True)
class Encoded:
    """A record, or a piece of one, in the student's tokens: token `l` covers document bytes `starts[l] .. ends[l]`.

    The document is the whole record's. In a chat the template writes the start token, and tokens that cover no bytes;
    those have an empty span where they occur.
    """

    record: Record
    tokens: np.ndarray  # int64, without the start token
    starts: np.ndarray  # int64, byte offsets
    ends: np.ndarray
    start: int | None = None  # in a chat; None: the student's own start token
    turn_ends: Mapping[int, int] | None = None  # in a chat: byte offset where a turn ends -> the token that ends it
    num_context: int = 0  # leading tokens of a piece that are context, supervised by the piece before

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the student's forward pass, including the start token."""
        return len(self.tokens) + 1


@dataclass(frozen=True)
class Example:
    """A training example. State `l` (of L) has seen the start token and `l` tokens, and predicts token `l`."""

    doc_id: str
    tokens_L: np.ndarray  # int64, starting with the start token
    labels_L: np.ndarray  # int64, NO_LABEL where nothing is supervised
    state_P: np.ndarray  # int64, the state that predicts the token containing the byte
    offset_P: np.ndarray  # int64, offset of the byte in that token
    symbols_P: np.ndarray  # int64, the symbol that the document has there
    kl_P: np.ndarray  # bool, contributes KL
    entry_symbols_PE: np.ndarray  # int64, NO_SYMBOL at padding
    entry_logprobs_PE: np.ndarray  # float32
    num_bytes: int  # supervised bytes: all bytes of supervised tokens; END is not a byte
    measures_P: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # float32, further measures in the dump, by column


def make_example(encoded: Encoded, start_id: int, end_id: int, max_bytes: int | None, masks: Masks) -> Example:
    """Align a record's targets with the student's tokens.

    The END of a segment is predicted from the state after its last token, by byte 0 of the interface and by the end
    token. If a segment ends inside a token there is no such state, and its END is left out.

    Args:
        max_bytes: bytes of each token that are supervised, from its first; None: all.
    """
    record, starts, ends = encoded.record, encoded.starts, encoded.ends
    inside = supervised_tokens(starts, ends, record.segments)
    inside[: encoded.num_context] = False
    if encoded.turn_ends is not None:
        inside &= ends > starts
    labels_L = np.append(np.where(inside, encoded.tokens, NO_LABEL), NO_LABEL)
    bytes_state, bytes_offset, bytes_at = _byte_positions(starts, ends, inside, max_bytes)
    end_state, end_at = end_positions(encoded, end_id)
    labels_L[end_state] = end_id
    row_of_byte, row_of_end = position_rows(record)
    rows = np.concatenate([row_of_byte[bytes_at], row_of_end[end_at]])
    document = np.frombuffer(record.document, dtype=np.uint8).astype(np.int64)
    entry_symbols_PE, entry_logprobs_PE = padded_entries(record, rows)
    return Example(
        doc_id=record.doc_id,
        tokens_L=np.concatenate([[start_id if encoded.start is None else encoded.start], encoded.tokens]).astype(
            np.int64
        ),
        labels_L=labels_L.astype(np.int64),
        state_P=np.concatenate([bytes_state, end_state]).astype(np.int64),
        offset_P=np.concatenate([bytes_offset, np.zeros(len(end_state))]).astype(np.int64),
        symbols_P=np.concatenate([document[bytes_at], np.full(len(end_state), END)]).astype(np.int64),
        kl_P=(record.doubt[rows] <= masks.max_doubt) & (record.token_end[rows] <= masks.max_token_end),
        entry_symbols_PE=entry_symbols_PE,
        entry_logprobs_PE=entry_logprobs_PE,
        num_bytes=int((ends - starts)[inside].sum()),
        measures_P={name: value_P[rows] for name, value_P in record.measures.items()},
    )


def _byte_positions(
    starts: np.ndarray, ends: np.ndarray, inside: np.ndarray, max_bytes: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (state, offset in the token, byte of the document) of the bytes the interface predicts, in order."""
    lengths = ends - starts if max_bytes is None else np.minimum(ends - starts, max_bytes)
    counts = np.where(inside, lengths, 0)
    state = np.repeat(np.arange(len(starts)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return state, offset, starts[state] + offset


def end_positions(encoded: Encoded, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (state, index of the segment) of each END that follows a token's last byte.

    In a chat, only where token `end_id` is written. An END inside or right after a piece's context is left out.
    """
    ends, turn_ends, num_context = encoded.ends, encoded.turn_ends, encoded.num_context
    positions = []
    for index, segment in enumerate(encoded.record.segments):
        stop = segment.start + segment.length
        if turn_ends is not None:
            state = turn_ends.get(stop)
            state = state if state is not None and encoded.tokens[state] == end_id else None
        else:
            tokens_before = int(np.searchsorted(ends, stop, side="right"))
            is_end = (ends[tokens_before - 1] if tokens_before else 0) == stop
            state = tokens_before if is_end and (tokens_before > num_context or not num_context) else None
        if segment.has_end and state is not None:
            positions.append((state, index))
    pairs = np.array(positions, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def position_rows(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Return the record's position for each byte of the document, and for the END of each segment.

    NO_ROW where the record has no such position.
    """
    of_byte = np.full(len(record.document), NO_ROW, dtype=np.int64)
    of_end = np.full(len(record.segments), NO_ROW, dtype=np.int64)
    position = 0
    for index, segment in enumerate(record.segments):
        of_byte[segment.start : segment.start + segment.length] = position + np.arange(segment.length)
        if segment.has_end:
            of_end[index] = position + segment.length
        position += segment.num_positions
    return of_byte, of_end


def padded_entries(record: Record, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored symbols and log-probabilities of these positions, padded to the maximum count."""
    counts = record.entry_counts.astype(np.int64)
    firsts = (np.cumsum(counts) - counts)[rows]
    width = int(counts[rows].max(initial=1))
    stored_PE = np.arange(width) < counts[rows][:, None]
    where = np.where(stored_PE, firsts[:, None] + np.arange(width), 0)
    symbols_PE = np.where(stored_PE, record.symbols[where].astype(np.int64), NO_SYMBOL)
    return symbols_PE, np.where(stored_PE, record.logprobs[where].astype(np.float32), 0.0).astype(np.float32)
