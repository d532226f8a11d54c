"""The positions of a dump's records that models are compared on: the same for all of them.

A model gives no distribution for bytes of a chat that share a token with its template. A record that one of the models
cannot spell is left out for all, and so are turns of a chat that one model's template writes differently.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from pipeline.runtime.format import count_of
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from pipeline.tokenization.chat_records import encode_by_turn
from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, Turn
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard
from schemas.storage.locations import Location
from stage2_student.data.examples import NO_ROW, position_rows
from stage2_student.evaluation.scored_text import Reader
from stage2_student.evaluation.spelled_text import UNSPELLABLE


def records_of(dump: Location) -> Iterator[Record]:
    """Yield all records of a dump, in order."""
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


def turn_rows(record: Record, turn: Turn, end_ids: Sequence[int]) -> np.ndarray:
    """Return the record's positions of a turn's bytes, and of the END after them.

    NO_ROW where a byte or END is not supervised, and for an END if the turn's last token is not in `end_ids`.
    """
    of_byte, of_end = position_rows(record)
    ends = dict(zip([s.start + s.length for s in record.segments], of_end.tolist(), strict=True))
    end_row = ends.get(turn.end, NO_ROW) if turn.end_token in end_ids else NO_ROW
    return np.append(of_byte[turn.start : turn.end], end_row)


def asked_positions(
    record: Record, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, end_ids: Sequence[int]
) -> tuple[np.ndarray, dict[int, str]]:
    """Find the positions that a model can be scored on.

    Returns:
        P, bool: True at those positions; and, by message, why turns of a chat are left out.
    Raises:
        SpellingError, ChatError: the model cannot read the record.
    """
    if not record.message_roles:
        tokenizer.encode(record.document)
        return np.ones(record.num_positions, dtype=bool), {}
    assert chat is not None
    [stored] = encode_by_turn(chat, [record])
    if isinstance(stored, ValueError):
        raise stored
    asked_P = np.zeros(record.num_positions, dtype=bool)
    for turn in (turn for encoded in stored.renderings for turn in encoded.turns):
        rows = turn_rows(record, turn, end_ids)
        asked_P[rows[rows != NO_ROW]] = True
    return asked_P, {message: _reason(fault) for message, fault in stored.left_out.items()}


@dataclass
class AskedRecords:
    """The records and positions of a dump that models are compared on.

    Attributes:
        reasons: record number -> why it is left out.
        masks: record number -> P, bool, for records of which some positions are left out.
        turns_left_out: turns of the other records that are left out, by reason.
        num_seen: number of records examined; later ones are not used.
        sha256: hash of the records and positions that are used: figures on different text are not comparable.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    turns_left_out: Counter[str] = field(default_factory=Counter)
    num_seen: int = 0
    sha256: str = ""

    @property
    def left_out(self) -> dict[str, int]:
        """Number of records left out, by reason."""
        return dict(Counter(self.reasons.values()))

    def records(self, dump: Location) -> Iterator[tuple[Record, np.ndarray]]:
        """Yield the records that are used, with P, bool: True at the positions that are used."""
        for number, record in enumerate(islice(records_of(dump), self.num_seen)):
            if number not in self.reasons:
                yield record, self.masks.get(number, np.ones(record.num_positions, dtype=bool))


def asked_records(
    dump: Location, models: Sequence[tuple[Reader, Sequence[int]]], limit: int | None = None
) -> AskedRecords:
    """Find the records and positions that all models can be scored on.

    Args:
        models: each with the tokens that mean END to it.
        limit: maximum number of records; those left out do not count.
    Raises:
        ValueError: there are none.
    """
    asked, digest = AskedRecords(), hashlib.sha256()
    num_asked = 0
    for record in records_of(dump):
        if num_asked == limit:
            break
        common = _common(record, models)
        if isinstance(common, str):
            asked.reasons[asked.num_seen] = common
        else:
            asked_P, turns = common
            asked.turns_left_out.update(turns)
            if not asked_P.all():
                asked.masks[asked.num_seen] = asked_P
            digest.update(f"{record.doc_id!r} {record.window_start} {record.document!r}".encode() + asked_P.tobytes())
            num_asked += 1
        asked.num_seen += 1
    if not num_asked:
        raise ValueError(
            f"{dump}: none of its {count_of(asked.num_seen, 'record')} can be compared: left out {asked.left_out}"
        )
    asked.sha256 = digest.hexdigest()
    return asked


def _common(record: Record, models: Sequence[tuple[Reader, Sequence[int]]]) -> tuple[np.ndarray, Collection[str]] | str:
    """Return (P, bool: the common positions; reasons for turns left out), or the reason why the record is left out.

    With several models, a reason names the first model that it applies to.
    """
    common_P = np.ones(record.num_positions, dtype=bool)
    turns: dict[int, str] = {}
    for reader, end_ids in models:
        named = "" if len(models) == 1 else f"{reader.name}: "
        try:
            asked_P, left_out = asked_positions(record, reader.tokenizer, reader.chat, end_ids)
        except (SpellingError, ChatError) as error:
            return named + _reason(error)
        common_P &= asked_P
        turns = {message: named + reason for message, reason in left_out.items()} | turns
    return (common_P, turns.values()) if common_P.any() else "no position that all models can be asked about"


def _reason(fault: ValueError) -> str:
    return fault.reason if isinstance(fault, ChatError) else UNSPELLABLE
