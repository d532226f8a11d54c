"""The table of a shard's columns: all code that writes, reads, checks, aligns, mixes or shows them iterates over it.

A record has the same fields whatever version of the format its file has. In the files of version 3 and later, some
fields are stored in other columns (`schemas.stored_entries`), so that `COLUMNS` has both, each with its versions.

A *measure* is a value per position besides its distribution. To add one, add an entry to `COLUMNS`, a field to
`schemas.record.Record`, and `NAME_P` to `pipeline.covering.targets.Targets`, which computes it; and, if not every dump
has it, a key to the recipe's `dump` section. The rest follows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from schemas import SCHEMA_VERSION, levels


class Axis(Enum):
    """The axis along which a column has values; coarsest first."""

    RECORD = "1"
    MESSAGE = "M"
    SEGMENT = "S"
    TOKEN = "T"
    BOUNDARY = "T + 1"
    POSITION = "P"
    ENTRY = "E"
    OTHER = "O"
    ALTERNATIVE = "A"


class Unit(Enum):
    """The unit of a column's numbers, as written in a shard's metadata, and the range of a measure of that unit."""

    TEXT = "text"
    BYTES = "bytes"
    FLAG = "flag"
    COUNT = "count"
    SYMBOL = "symbol"
    TOKEN_ID = "token id"
    NATURAL_LOG = "natural log"
    NATS = "nats"
    SHARE = "shares 0..1"

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0) if self is Unit.SHARE else (0.0, math.inf)


class Mixing(Enum):
    """The value of a column in a record mixed from several teachers (`stage2_student.data.mix`)."""

    COMMON = "what their records have in common"
    DISTRIBUTION = "part of the distribution, which is mixed as a whole"
    MEAN = "the weighted mean"
    NONE = "nothing"


def _list(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


@dataclass(frozen=True)
class Column:
    """One column of a shard.

    Attributes:
        kind: Arrow's type of one value; on any axis but RECORD the column holds flat lists of it.
        meaning: written into the files. A change here changes the bytes of every shard.
        detail: additional text of the specification.
        rounded: rounds values to the stored levels, unless a dump stores exact numbers (`levels.EXACT`).
        heading: of a measure, over its column in `bld inspect`: at most 7 characters.
        flagged: of a measure, the value above which `bld inspect` highlights it.
        stored_where: the dotted key of a dump's identity whose shards have the column; None: all shards have it.
        always: False for a column that some released shards lack: a reader does not require it.
        since: the format version that introduced it.
        until: the last version whose files have it; None: those of the newest do.
    """

    name: str
    axis: Axis
    kind: pa.DataType
    unit: Unit
    meaning: str
    detail: str = ""
    mixed: Mixing = Mixing.COMMON
    rounded: Callable[[np.ndarray], np.ndarray] | None = None
    heading: str = ""
    flagged: float = math.inf
    stored_where: str | None = None
    always: bool = True
    since: int = 1
    until: int | None = None

    @cached_property
    def is_list(self) -> bool:
        return self.axis is not Axis.RECORD

    @cached_property
    def is_measure(self) -> bool:
        """True if it has a value per position and is not part of the distribution."""
        return self.axis is Axis.POSITION and self.mixed is not Mixing.DISTRIBUTION

    def is_in(self, version: int) -> bool:
        """Tell whether files of a format version may have the column."""
        return self.since <= version <= (SCHEMA_VERSION if self.until is None else self.until)

    @property
    def field(self) -> pa.Field:
        """Arrow's field for the column."""
        axis = f"{self.axis.value}: " if self.is_list else ""
        kind = _list(self.kind) if self.is_list else self.kind
        return pa.field(self.name, kind, nullable=False, metadata={"description": f"{axis}{self.meaning}"})

    def is_stored(self, identity: Mapping[str, Any]) -> bool:
        """Tell whether the shards of a dump with that identity have the column."""
        value: Any = identity
        for key in self.stored_where.split(".") if self.stored_where else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        return self.stored_where is None or bool(value)

    def as_stored(self, values: np.ndarray, exact: bool) -> np.ndarray:
        """Convert numbers to their stored form: float32, rounded to levels unless the dump is `exact`."""
        return values.astype(np.float32) if exact or self.rounded is None else self.rounded(values)


def _share(name: str, meaning: str, detail: str = "", heading: str = "", until: int | None = None) -> Column:
    """Return a measure in shares, which says how far a target can be trusted."""
    return Column(
        name,
        Axis.POSITION,
        pa.float32(),
        Unit.SHARE,
        meaning,
        detail,
        Mixing.MEAN,
        levels.round_shares,
        heading or name,
        flagged=0.05,
        until=until,
    )


def _of_tokens(
    name: str,
    axis: Axis,
    kind: pa.DataType,
    unit: Unit,
    meaning: str,
    rounded: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Column:
    """Return a column of the teacher's tokens and their alternatives (`schemas.token_alternatives`)."""
    return Column(name, axis, kind, unit, meaning, mixed=Mixing.NONE, rounded=rounded, stored_where="tokens", since=2)


# In the order of the files of versions 1 and 2.
_COLUMNS: tuple[Column, ...] = (
    Column(
        "doc_id",
        Axis.RECORD,
        pa.string(),
        Unit.TEXT,
        "name of the document in its corpus; windows of one document share it",
    ),
    Column(
        "window_start",
        Axis.RECORD,
        pa.int64(),
        Unit.BYTES,
        "byte offset of this record in its document; 0 unless the document was cut into windows",
    ),
    Column(
        "document",
        Axis.RECORD,
        pa.binary(),
        Unit.TEXT,
        "the record's bytes, UTF-8; of a chat the contents of its messages, joined",
        " in order; of one with a `conversation`, for the assistant's what the teacher's template writes for the turn",
        until=2,
    ),
    Column(
        "message_roles",
        Axis.MESSAGE,
        pa.string(),
        Unit.TEXT,
        "who says each message of a chat; empty for plain text",
        always=False,
    ),
    Column(
        "message_lengths",
        Axis.MESSAGE,
        pa.int32(),
        Unit.BYTES,
        "bytes of each message of a chat; empty for plain text",
        "; they sum to the document's length",
        always=False,
    ),
    Column(
        "segment_starts",
        Axis.SEGMENT,
        pa.int32(),
        Unit.BYTES,
        "byte offset where each supervised segment starts",
    ),
    Column("segment_lengths", Axis.SEGMENT, pa.int32(), Unit.BYTES, "bytes in each segment"),
    Column(
        "segment_has_end",
        Axis.SEGMENT,
        pa.bool_(),
        Unit.FLAG,
        "whether the segment has a last position that asks for END",
    ),
    Column(
        "teacher_token_lengths",
        Axis.TOKEN,
        pa.int32(),
        Unit.BYTES,
        "bytes of each token of the teacher's encoding of the document; of a chat, what lies between segments is one "
        "entry",
        ", as is what lies before and after them; they sum to the document's length",
        Mixing.NONE,
    ),
    Column(
        "teacher_token_logprobs",
        Axis.TOKEN,
        pa.float32(),
        Unit.NATURAL_LOG,
        "nats, of each such token given those before; 0 for what lies between the segments of a chat",
        " or outside of them; off by at most 0.02 √nats down to -16, and by 0.8 below",
        Mixing.NONE,
        levels.round_token_logprobs,
    ),
    Column(
        "entry_counts",
        Axis.POSITION,
        pa.uint16(),
        Unit.COUNT,
        "stored entries",
        " of each position",
        Mixing.DISTRIBUTION,
        until=2,
    ),
    _share(
        "dropped",
        "share of the prefix's known mass on branches that end here and were not expanded",
        ": on teacher tokens that end here off the canonical path and were not followed; of a served teacher also "
        "what it did not list of the row that starts here",
    ),
    _share(
        "token_end",
        "largest share on tokens that end off the canonical path, since the canonical token began",
        "; 0 at its start",
        heading="tok_end",
        until=2,
    ),
    _share("doubt", "estimated total variation between the stored target and the exact one"),
    Column(
        "symbols",
        Axis.ENTRY,
        pa.uint8(),
        Unit.SYMBOL,
        "0-254 a byte, 255 END; in descending probability within a position",
        mixed=Mixing.DISTRIBUTION,
        until=2,
    ),
    Column(
        "logprobs",
        Axis.ENTRY,
        pa.float32(),
        Unit.NATURAL_LOG,
        "natural log of the probability; what is left to 1 is the tail",
        mixed=Mixing.DISTRIBUTION,
        until=2,
    ),
    Column(
        "conversation",
        Axis.RECORD,
        pa.string(),
        Unit.TEXT,
        "JSON: messages and tools as a chat template was given them, this record's messages the last; empty where "
        "roles and contents say all",
        " (see *Chats*)",
        stored_where="corpus.turns",
    ),
    _of_tokens(
        "alternative_counts",
        Axis.TOKEN,
        pa.uint16(),
        Unit.COUNT,
        "stored alternatives of each entry of teacher_token_lengths; 0 for one none of whose bytes is supervised",
    ),
    _of_tokens(
        "teacher_token_ranks",
        Axis.TOKEN,
        pa.uint16(),
        Unit.COUNT,
        "place of the text's own token among its alternatives, from 0; 0 where there are none",
    ),
    _of_tokens(
        "alternative_ids",
        Axis.ALTERNATIVE,
        pa.int32(),
        Unit.TOKEN_ID,
        "ids of the teacher's most probable tokens and of the text's own; in descending probability within a token, "
        "ties by ascending id",
    ),
    _of_tokens(
        "alternative_logprobs",
        Axis.ALTERNATIVE,
        pa.float32(),
        Unit.NATURAL_LOG,
        "natural log of an alternative's probability in the softmax over the teacher's whole vocabulary; what is left "
        "to 1 is the tail",
    ),
    _of_tokens(
        "end_token_logprobs",
        Axis.BOUNDARY,
        pa.float32(),
        Unit.NATURAL_LOG,
        "nats, of the teacher's end tokens together, before each token and after the last; nan where it was not "
        "computed, outside of a chat's turns",
        rounded=levels.round_token_logprobs,
    ),
)


def _distribution(name: str, axis: Axis, kind: pa.DataType, unit: Unit, meaning: str) -> Column:
    """Return a column of version 3 that makes up the distributions."""
    return Column(name, axis, kind, unit, meaning, mixed=Mixing.DISTRIBUTION, since=3)


_OF = {column.name: column for column in _COLUMNS}
# By the column of versions 1 and 2 in whose place they are.
_IN_PLACE: Mapping[str, tuple[Column, ...]] = {
    "document": (replace(_OF["document"], kind=pa.string(), since=3, until=None),),
    "entry_counts": (
        _distribution(
            "realised_logprobs",
            Axis.POSITION,
            pa.float32(),
            Unit.NATURAL_LOG,
            "natural log of the probability of the symbol that the document has there: its byte, or END",
        ),
        _distribution("other_counts", Axis.POSITION, pa.uint16(), Unit.COUNT, "other stored symbols"),
    ),
    "token_end": (
        replace(
            _OF["token_end"],
            meaning=f"{_OF['token_end'].meaning}; empty if it is the largest dropped since then, of all the record",
            detail=", or since the segment began, if that was later; 0 at a token's start",
            since=3,
            until=None,
        ),
    ),
    "symbols": (
        _distribution(
            "other_symbols",
            Axis.OTHER,
            pa.uint8(),
            Unit.SYMBOL,
            "0-254 a byte, 255 END; ascending within a position, without the one that the document has there",
        ),
    ),
    "logprobs": (
        _distribution(
            "other_logprobs",
            Axis.OTHER,
            pa.float32(),
            Unit.NATURAL_LOG,
            "natural log of the probability of each of them; what is left to 1 is the tail",
        ),
    ),
}
COLUMNS: tuple[Column, ...] = tuple(one for column in _COLUMNS for one in (column, *_IN_PLACE.get(column.name, ())))
BY_NAME = {column.name: column for column in _COLUMNS}  # the fields of a record
MEASURES = tuple(column for column in _COLUMNS if column.is_measure)


def columns_of(version: int = SCHEMA_VERSION) -> tuple[Column, ...]:
    """Return the columns that shards of a format version may have, in the order of the files."""
    return tuple(column for column in COLUMNS if column.is_in(version))


def shard_schema(identity: Mapping[str, Any], version: int = SCHEMA_VERSION) -> pa.Schema:
    """Return the columns of a dump's shards, which are the same for all shards of a dump."""
    return pa.schema([column.field for column in columns_of(version) if column.is_stored(identity)])


def units(identity: Mapping[str, Any], version: int = SCHEMA_VERSION) -> str:
    """Describe in one line, for their metadata, the units of a dump's shards."""
    columns = [column for column in columns_of(version) if column.is_stored(identity)]
    finest_first = sorted(columns, key=lambda column: list(Axis).index(column.axis), reverse=True)
    parts = []
    for unit in (Unit.NATURAL_LOG, Unit.NATS, Unit.SHARE):
        names = [column.name for column in finest_first if column.unit is unit]
        parts += [f"{', '.join(names)}: {unit.value}"] if names else []
    return "; ".join([*parts, f"lengths and starts: {Unit.BYTES.value}"])


def differ(actual: pa.Field, expected: pa.Field) -> bool:
    """Tell whether two columns differ in type, or in whether they may hold null; metadata is not compared."""
    return bool(actual.type != expected.type or actual.nullable != expected.nullable)


def describe_field(field: pa.Field) -> str:
    """Describe a column's type in Arrow's words: `double`, `list<element: float not null> not null`."""
    return f"{field.type}{'' if field.nullable else ' not null'}"
