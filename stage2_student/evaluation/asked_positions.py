"""Which positions of a dump's records models are asked about: the same for all that are compared.

A model says nothing of bytes of a chat that share a token with its template. A record that one of the models cannot
spell is left out for all, and so are turns of a chat that one's template writes otherwise.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

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
    """All records of a dump, in order."""
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


def turn_rows(record: Record, turn: Turn, end_ids: Sequence[int]) -> np.ndarray:
    """The record's positions of a turn's bytes, and of the END after them; NO_ROW where a byte or END is not
    supervised, or not asked.
    """
    of_byte, of_end = position_rows(record)
    ends = dict(zip([s.start + s.length for s in record.segments], of_end.tolist(), strict=True))
    end_row = ends.get(turn.end, NO_ROW) if turn.end_token in end_ids else NO_ROW
    return np.append(of_byte[turn.start : turn.end], end_row)


def asked_positions(
    record: Record, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, end_ids: Sequence[int]
) -> tuple[np.ndarray, dict[int, str]]:
    """P, bool: positions that a model can be asked about; and why not about turns of a chat, by their message.

    Raises SpellingError or ChatError where it cannot be asked about the record.
    """
    if not record.message_roles:
        tokenizer.encode(record.document)
        return np.ones(record.num_positions, dtype=bool), {}
    assert chat is not None
    [found] = encode_by_turn(chat, [record])
    if isinstance(found, ValueError):
        raise found
    asked_P = np.zeros(record.num_positions, dtype=bool)
    for turn in (turn for encoded in found.renderings for turn in encoded.turns):
        rows = turn_rows(record, turn, end_ids)
        asked_P[rows[rows != NO_ROW]] = True
    return asked_P, {message: _reason(fault) for message, fault in found.left_out.items()}


@dataclass
class AskedRecords:
    """What is asked of a dump.

    Attributes:
        reasons: why a record is left out, by its number.
        masks: P, bool, of those records of which not all positions are asked about, by number.
        turns_left_out: of these records' turns those that are not asked about at all, by reason.
        num_seen: records that were looked at; later ones are not asked about.
        sha256: of the records and positions that are asked about: figures of unlike text do not compare.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    turns_left_out: Counter[str] = field(default_factory=Counter)
    num_seen: int = 0
    sha256: str = ""

    @property
    def left_out(self) -> dict[str, int]:
        """Records by reason."""
        return dict(Counter(self.reasons.values()))

    def records(self, dump: Location) -> Iterator[tuple[Record, np.ndarray]]:
        """The records that are asked about, with P, bool: where."""
        for number, record in enumerate(islice(records_of(dump), self.num_seen)):
            if number not in self.reasons:
                yield record, self.masks.get(number, np.ones(record.num_positions, dtype=bool))


def asked_records(
    dump: Location, models: Sequence[tuple[Reader, Sequence[int]]], limit: int | None = None
) -> AskedRecords:
    """What all models can be asked about.

    Args:
        models: each with the tokens that mean END to it.
        limit: records to ask about; those left out do not count.
    Raises:
        ValueError: nothing.
    """
    found, digest = AskedRecords(), hashlib.sha256()
    num_asked = 0
    for record in records_of(dump):
        if num_asked == limit:
            break
        common = _common(record, models)
        if isinstance(common, str):
            found.reasons[found.num_seen] = common
        else:
            asked_P, turns = common
            found.turns_left_out.update(turns)
            if not asked_P.all():
                found.masks[found.num_seen] = asked_P
            digest.update(f"{record.doc_id!r} {record.window_start} {record.document!r}".encode() + asked_P.tobytes())
            num_asked += 1
        found.num_seen += 1
    if not num_asked:
        raise ValueError(f"{dump}: none of its {found.num_seen} records can be asked about: left out {found.left_out}")
    found.sha256 = digest.hexdigest()
    return found


def _common(record: Record, models: Sequence[tuple[Reader, Sequence[int]]]) -> tuple[np.ndarray, Collection[str]] | str:
    """P, bool, and why turns are left out; or why the record is. Among several models with the name of the first that
    cannot be asked.
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
