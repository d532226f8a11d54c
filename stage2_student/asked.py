"""Which positions of a dump's records models are asked about: the same for all that are compared.

A model says nothing of bytes of a chat that share a token with its template. A record that one of the models cannot spell, or whose chat
one's template changes, is left out for all.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from pipeline.chat import ChatTokenizer, Turn
from pipeline.chat_template import ChatError
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard
from schemas.store import Location
from stage2_student.batches import NO_ROW, position_rows
from stage2_student.scored_text import Reader
from stage2_student.spelled import UNSPELLABLE


def records_of(dump: Location) -> Iterator[Record]:
    """All records of a dump, in order."""
    for shard in Manifest.load(dump).shards:
        yield from read_shard(shard.path(dump))


def turn_rows(record: Record, turn: Turn, end_ids: Sequence[int]) -> np.ndarray:
    """The record's positions of a turn's bytes, and of the END after them; NO_ROW where a byte or END is not supervised, or not asked."""
    of_byte, of_end = position_rows(record)
    ends = dict(zip([s.start + s.length for s in record.segments], of_end.tolist(), strict=True))
    end_row = ends.get(turn.end, NO_ROW) if turn.end_token in end_ids else NO_ROW
    return np.append(of_byte[turn.start : turn.end], end_row)


def asked_positions(
    record: Record, tokenizer: ByteTokenizer, chat: ChatTokenizer | None, end_ids: Sequence[int]
) -> np.ndarray:
    """P, bool: positions that a model can be asked about. Raises SpellingError or ChatError where there are none."""
    if not record.message_roles:
        tokenizer.encode(record.document)
        return np.ones(record.num_positions, dtype=bool)
    assert chat is not None
    asked_P = np.zeros(record.num_positions, dtype=bool)
    for turn in chat.encode_stored(record).turns:
        rows = turn_rows(record, turn, end_ids)
        asked_P[rows[rows != NO_ROW]] = True
    return asked_P


@dataclass
class AskedRecords:
    """What is asked of a dump.

    Attributes:
        reasons: why a record is left out, by its number.
        masks: P, bool, of those records of which not all positions are asked about, by number.
        num_seen: records that were looked at; later ones are not asked about.
        sha256: of the records and positions that are asked about: figures of unlike text do not compare.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
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
        asked_P = _common(record, models)
        if isinstance(asked_P, str):
            found.reasons[found.num_seen] = asked_P
        else:
            if not asked_P.all():
                found.masks[found.num_seen] = asked_P
            digest.update(f"{record.doc_id!r} {record.window_start} {record.document!r}".encode() + asked_P.tobytes())
            num_asked += 1
        found.num_seen += 1
    if not num_asked:
        raise ValueError(f"{dump}: none of its {found.num_seen} records can be asked about: left out {found.left_out}")
    found.sha256 = digest.hexdigest()
    return found


def _common(record: Record, models: Sequence[tuple[Reader, Sequence[int]]]) -> np.ndarray | str:
    """P, bool; or why the record is left out, among several models with the name of the one that cannot be asked."""
    common_P = np.ones(record.num_positions, dtype=bool)
    for reader, end_ids in models:
        try:
            common_P &= asked_positions(record, reader.tokenizer, reader.chat, end_ids)
        except (SpellingError, ChatError) as error:
            reason = error.reason if isinstance(error, ChatError) else UNSPELLABLE
            return reason if len(models) == 1 else f"{reader.name}: {reason}"
    return common_P if common_P.any() else "no position that all models can be asked about"
