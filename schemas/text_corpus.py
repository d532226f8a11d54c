"""A corpus of written text: shards of rows, each a prompt with what a model wrote after it, and a manifest.

Like a dump's, a shard is absent or complete, and its name is the only record of progress. Rows hold what a recipe's
corpus section reads: plain text with its supervised segments, or a chat whose last turn is supervised.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas import dump_files
from schemas.dump_files import Key
from schemas.file_seal import BLANK, seal
from schemas.manifest import ShardPlan, read_json, write_json
from schemas.record import Segment
from schemas.storage.atomic import committed
from schemas.storage.locations import Location, names_below, open_parquet

VERSION = 1  # of this format
_REMEDY = "Run `bld generate` again in a new folder, or restore the file"
_ZSTD_LEVEL = 9


def _list(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


_MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reasoning_content", pa.string(), nullable=False),
        pa.field("tool_calls", pa.string(), nullable=False),
        pa.field("tool_call_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
    ]
)
# Name, Arrow's type, meaning. The text or the messages are what a corpus section reads as `text` or `messages`.
COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("doc_id", pa.string(), "the prompt's id, a slash, and the number of the completion"),
    ("text", pa.string(), "prompt and completion; empty for a chat"),
    ("segment_starts", _list(pa.int32()), "byte offset in the text where each supervised part starts"),
    ("segment_lengths", _list(pa.int32()), "bytes in each supervised part: what the model wrote"),
    ("segment_has_end", _list(pa.bool_()), "whether END follows it: the model ended by itself"),
    ("messages", _list(_MESSAGE), "a chat's messages; tool_calls are JSON; what is absent is empty text"),
    ("tools", pa.string(), "JSON: the tools that a chat's assistant may call; empty without any"),
    ("supervised_messages", _list(pa.int32()), "numbers of the messages that the model wrote"),
    ("is_finished", pa.bool_(), "whether the model ended by itself, so that END is supervised"),
    ("prompt_id", pa.string(), "id of the prompt in its corpus"),
    ("completion", pa.int32(), "number of the completion among those of its prompt, from 0"),
    ("seed", pa.int64(), "of the sampling of this completion"),
    ("num_tokens", pa.int32(), "tokens that the model wrote, END included"),
)
SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False, metadata={"description": meaning}) for name, kind, meaning in COLUMNS]
)
NAMES = frozenset(SCHEMA.names)


@dataclass(frozen=True)
class WrittenText:
    """A row: a prompt and a completion of it.

    Attributes:
        text: of plain text; else "".
        segments: its supervised parts, in bytes of its UTF-8.
        messages: of a chat, each with the keys of the column; else empty.
        tools: JSON, or "".
        supervised_messages: numbers of the messages that the model wrote.
        is_finished: the model ended by itself.
    """

    doc_id: str
    text: str
    segments: tuple[Segment, ...]
    messages: tuple[Mapping[str, str], ...]
    tools: str
    supervised_messages: tuple[int, ...]
    is_finished: bool
    prompt_id: str
    completion: int
    seed: int
    num_tokens: int

    def columns(self) -> dict[str, Any]:
        """Return the row as values of the columns."""
        values = {name: value for name, value in asdict(self).items() if name in NAMES}
        lacking = dict.fromkeys((field.name for field in _MESSAGE), "")
        return values | {
            "segment_starts": [segment.start for segment in self.segments],
            "segment_lengths": [segment.length for segment in self.segments],
            "segment_has_end": [segment.has_end for segment in self.segments],
            "messages": [lacking | dict(message) for message in self.messages],
        }


def segments_of(columns: Mapping[str, Any]) -> tuple[Segment, ...]:
    """Return the supervised parts that a row of a written corpus holds."""
    names = ("segment_starts", "segment_lengths", "segment_has_end")
    return tuple(Segment(*values) for values in zip(*(columns[name] for name in names), strict=True))


class TextManifest(BaseModel):
    """The identity and the plan of a written corpus: shards of prompts.

    Attributes:
        identity: everything that decides the content.
        prompt_counts: what the corpus of prompts held and what was left out, by reason.
        shards: documents and bytes are those of the prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_version: int = VERSION
    identity: dict[str, Any]
    prompt_counts: dict[str, int]
    shards: tuple[ShardPlan, ...]

    @property
    def has_chats(self) -> bool:
        return bool(self.identity.get("prompts", {}).get("field") == "messages")

    def missing(self, folder: Location) -> list[ShardPlan]:
        """Return the planned shards whose file does not exist."""
        present = names_below(folder / dump_files.SHARDS)
        return [shard for shard in self.shards if shard.file not in present]

    def save(self, folder: Location) -> None:
        """Write the manifest into the corpus's folder."""
        write_json(folder / dump_files.TEXT_MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Location) -> "TextManifest":
        """Read a corpus's manifest. Raises ValueError if it is damaged, or of a version that is not read here."""
        path = folder / dump_files.TEXT_MANIFEST
        values = read_json(path, "text_version", "identity", "shards", remedy=_REMEDY)
        if values["text_version"] != VERSION:
            raise ValueError(
                f"{path} has version {values['text_version']!r} of the format of written text; this release reads "
                f"{VERSION}. It was written by a newer bld: use that"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path} is damaged: {where}: {first['msg']}. {_REMEDY}") from None


def is_text_corpus(folder: Location) -> bool:
    """Return whether a folder holds a written corpus, complete or not."""
    return (folder / dump_files.TEXT_MANIFEST).exists()


def text_shards(folder: Location) -> list[Location]:
    """Return the shards of a complete written corpus, in order. Raises ValueError for an incomplete one."""
    manifest = TextManifest.load(folder)
    missing = manifest.missing(folder)
    if missing:
        raise ValueError(
            f"{folder} is not complete: {len(missing)} of {len(manifest.shards)} shards are missing. Run the same "
            "`bld generate` again, which makes them"
        )
    return [shard.path(folder) for shard in manifest.shards]


def commit_text_shard(
    rows: Sequence[WrittenText], path: Location, identity: Mapping[str, Any], counted: Mapping[str, Any]
) -> int:
    """Write a shard so that `path` is absent or complete, unless one is there already. Returns its size in bytes.

    Args:
        counted: what was counted while it was made, stored in its metadata.
    """
    metadata = {
        Key.TEXT_VERSION: str(VERSION),
        Key.IDENTITY: json.dumps(identity, sort_keys=True),
        Key.COUNTED: json.dumps(counted, sort_keys=True),
    }
    values = [row.columns() for row in rows]
    table = pa.table({name: [row[name] for row in values] for name in SCHEMA.names}, schema=SCHEMA)
    with committed(path, first=True) as partial:
        with pq.ParquetWriter(
            partial,
            SCHEMA.with_metadata(dict(metadata)),
            compression="zstd",
            compression_level=_ZSTD_LEVEL,
            write_page_checksum=True,
        ) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({Key.SHA256: BLANK})
        seal(partial)
    return path.stat().st_size


def text_shard_counts(path: Location) -> dict[str, Any]:
    """Return what was counted while a shard was made, from its metadata. Raises ValueError for another file."""
    with open_parquet(path) as file:
        metadata = file.schema_arrow.metadata or {}
    if Key.COUNTED.encode() not in metadata:
        raise ValueError(f"{path} is not a shard of written text: its Parquet metadata lacks {Key.COUNTED}")
    return dict(json.loads(metadata[Key.COUNTED.encode()]))
