"""The data path: shards -> records in a seeded order -> the student's tokens -> global batches.

Where we are is a value, `Position`, handed out with each batch; a checkpoint stores it and nothing else is needed.
Each rank reads and encodes the same stream and takes its share of each global batch: the batches are the same in any
world, a resume may change the world, and no two ranks meet the same document. Byte targets are built for its own share.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from pipeline.chat import ChatTokenizer, EncodedChat
from pipeline.chat_template import ChatError
from pipeline.config import DumpRef
from schemas.shard import Record, num_records, read_shard
from schemas.store import Location, location
from stage2_student.align import aligned
from stage2_student.batches import Encoded
from stage2_student.join import Join, Joined, OpenDump
from stage2_student.mix import Mix
from stage2_student.spans import token_spans

Item = TypeVar("Item")

_TOO_LONG = "longer than train.max_tokens"
BUFFER_RECORDS = 2048  # records that are shuffled together; at 2 kB of text and 20 bytes per position about 80 MB


class Position(NamedTuple):
    """The next record to take: the `record`-th of the epoch's order."""

    epoch: int
    record: int


START = Position(0, 0)


class Tokenizer(Protocol):
    """What the reader needs of `pipeline.tokenizer_bytes.ByteTokenizer`."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    @property
    def prefix(self) -> bytes: ...
    def encode_batch(self, documents: Sequence[bytes]) -> Sequence[list[int] | ValueError]: ...


@dataclass(frozen=True)
class GlobalBatch:
    """The documents of one optimizer step over all ranks, and what was left out while they were gathered."""

    documents: tuple[Encoded, ...]
    after: Position
    left_out: Counter[str]

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)


class DumpReader:
    """The records of a complete dump, in an order decided by seed and epoch; of several dumps those whose document all of them hold, mixed.

    Args:
        dump: the one whose order is followed.
        others: dumps of the same corpus; `mix` makes one record of theirs and the first one's.
    Raises:
        ValueError: a planned shard is missing, a dump holds no record, or several have no document in common.
    """

    def __init__(self, dump: Location, seed: int, others: Sequence[Location] = (), mix: Mix | None = None) -> None:
        assert bool(others) == (mix is not None)
        dumps = [OpenDump(path) for path in (dump, *others)]
        self.seed, self.mix = seed, mix
        self.manifest, self.other_manifests = dumps[0].manifest, [other.manifest for other in dumps[1:]]
        self.shards = dumps[0].shards
        self.join = Join(dumps) if others else None

    @classmethod
    def of(cls, refs: Sequence[DumpRef], how: Literal["arithmetic", "geometric"], seed: int) -> "DumpReader":
        """Of a recipe's dumps; `how` several are mixed."""
        paths = [location(ref.path) for ref in refs]
        mix = Mix.of([ref.weight for ref in refs], how) if len(refs) > 1 else None
        return cls(paths[0], seed, paths[1:], mix)

    @property
    def remarks(self) -> dict[str, int]:
        """What several dumps do not have in common: a number of documents for each sentence about it."""
        return {} if self.join is None else self.join.remarks

    def records(self, start: Position = START) -> Iterator[tuple[Record, Position]]:
        """Yield each record with the position after it, epoch after epoch, without end.

        A resume draws the order up to `start` again, and reads only the shards whose records are waiting in the buffer there.
        """
        epoch, skip = start
        while True:
            index = skip
            for index, joined in enumerate(self._epoch(epoch, skip), skip + 1):
                yield self._one(joined), Position(epoch, index)
            if index == 0:
                raise ValueError(f"the {len(self.shards)} shards in {self.shards[0].parent} hold no record")
            epoch, skip = epoch + 1, 0

    def _one(self, joined: Joined) -> Record:
        record, others = joined
        return record if self.mix is None else self.mix(aligned(record, others))

    def _epoch(self, epoch: int, skip: int) -> Iterator[Joined]:
        """Shards in a drawn order; within it, each record is drawn from a buffer that the next one refills. After the first `skip`."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.shards)).tolist()
        places = (_Place(shard, row) for shard in order for row in range(self._num_records(shard)))
        waiting, last = _skip(places, random, skip)
        buffer = self._at(waiting)
        for joined in self._after(order, last):
            buffer.append(joined)
            if len(buffer) > BUFFER_RECORDS:
                yield _draw(buffer, random)
        while buffer:
            yield _draw(buffer, random)

    def _shard(self, index: int) -> Iterator[Joined]:
        if self.join is not None:
            return self.join.shard(index)
        return ((record, ()) for record in read_shard(self.shards[index]))

    def _num_records(self, shard: int) -> int:
        """How many `_shard` yields: of several dumps only reading tells."""
        return num_records(self.shards[shard]) if self.join is None else sum(1 for _ in self.join.shard(shard))

    def _at(self, places: Sequence["_Place"]) -> list[Joined]:
        wanted = set(places)
        found: dict[_Place, Joined] = {}
        for shard in sorted({place.shard for place in places}):
            rows = ((_Place(shard, row), joined) for row, joined in enumerate(self._shard(shard)))
            found.update((place, joined) for place, joined in rows if place in wanted)
        return [found[place] for place in places]

    def _after(self, order: Sequence[int], last: "_Place | None") -> Iterator[Joined]:
        """The records of the shards in this order, after that place (None: all)."""
        first = 0 if last is None else order.index(last.shard)
        for shard in order[first:]:
            done = last.row + 1 if last is not None and shard == last.shard else 0
            yield from islice(self._shard(shard), done, None)


class _Place(NamedTuple):
    """Where a record stands: the shard, and which of its records it is."""

    shard: int
    row: int


def _skip(places: Iterator[_Place], random: np.random.Generator, count: int) -> tuple[list[_Place], _Place | None]:
    """Draw so many from the buffer. Returns what is left in it, and the last place that came into it."""
    waiting: list[_Place] = []
    last = None
    for _ in range(count):
        for last in islice(places, BUFFER_RECORDS + 1 - len(waiting)):
            waiting.append(last)
        _draw(waiting, random)
    return waiting, last


def _draw(buffer: list[Item], random: np.random.Generator) -> Item:
    """Take a random item out, in constant time."""
    chosen = int(random.integers(len(buffer)))
    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
    return buffer.pop()


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, max_tokens: int, chat: ChatTokenizer | None = None
) -> list[Encoded | str]:
    """Each record in the student's tokens, or the reason why it is left out. Nothing is ever cut.

    Args:
        chat: the tokenizer with its chat template. ValueError where it is None and there is a chat among the records.
    """
    plain = [record for record in records if not record.message_roles]
    ids_of_plain = iter(tokenizer.encode_batch([record.document for record in plain]))
    chats = [record for record in records if record.message_roles]
    if chats and chat is None:
        raise ValueError(
            f"the dump holds chats (document {chats[0].doc_id!r}), and the student has no chat template; give student.chat_template"
        )
    of_chats = iter(chat.encode_batch([record.messages for record in chats]) if chat is not None else [])
    encoded: list[Encoded | str] = []
    for record in records:
        ids = next(of_chats) if record.message_roles else next(ids_of_plain)
        if isinstance(ids, ChatError):
            encoded.append(ids.reason)
        elif isinstance(ids, ValueError):
            encoded.append("the student's tokenizer cannot spell it")
        elif isinstance(ids, EncodedChat):
            found = encoded_chat(record, ids, tokenizer)
            encoded.append(found if found.num_tokens <= max_tokens else _TOO_LONG)
        elif len(ids) + 1 > max_tokens:
            encoded.append(_TOO_LONG)
        else:
            encoded.append(_encoded(record, ids, tokenizer))
    return encoded


def encoded_chat(record: Record, chat: EncodedChat, tokenizer: Tokenizer) -> Encoded:
    """A chat's tokens and the bytes they cover; its first token is the start. Tokens outside turns stand empty: what ends a turn at
    its end, others where the next turn starts."""
    starts = np.full(len(chat.tokens), chat.turns[0].start, dtype=np.int64)
    ends = starts.copy()
    for turn, after in zip_longest(chat.turns, chat.turns[1:]):
        sizes = [len(tokenizer.token_bytes[token] or b"") for token in chat.tokens[turn.first : turn.last]]
        edges = np.maximum(turn.start - len(turn.prefix) + np.cumsum([0, *sizes]), turn.start)
        starts[turn.first : turn.last], ends[turn.first : turn.last] = edges[:-1], edges[1:]
        starts[turn.last : turn.last + 1] = ends[turn.last : turn.last + 1] = turn.end
        if after is not None:
            starts[turn.last + 1 :] = ends[turn.last + 1 :] = after.start
    turn_ends = {turn.end: turn.last - 1 for turn in chat.turns if turn.end_token is not None}
    return Encoded(
        record,
        np.array(chat.tokens[1:], dtype=np.int64),
        starts[1:],
        ends[1:],
        start=chat.tokens[0],
        turn_ends=turn_ends,
    )


def _encoded(record: Record, ids: Sequence[int], tokenizer: Tokenizer) -> Encoded:
    spans = token_spans([tokenizer.token_bytes[i] or b"" for i in ids], record.document, tokenizer.prefix)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    ends = np.array([span.stop for span in spans], dtype=np.int64)
    return Encoded(record, np.array(ids, dtype=np.int64), starts, ends)


def global_batches(
    reader: DumpReader,
    tokenizer: Tokenizer,
    batch_tokens: int,
    max_tokens: int,
    start: Position = START,
    chat: ChatTokenizer | None = None,
) -> Iterator[GlobalBatch]:
    """Documents in order until they hold at least `batch_tokens` student tokens; without end.

    Raises ValueError when a whole epoch's records are all left out, with the reasons.
    """
    documents: list[Encoded] = []
    left_out: Counter[str] = Counter()
    num_tokens, unused_since = 0, start
    for encoded, after in _encoded_stream(reader, tokenizer, max_tokens, start, chat):
        if isinstance(encoded, str):
            left_out[encoded] += 1
            if after.epoch > unused_since.epoch + 1:
                raise ValueError(
                    f"no record of the dump can be used: {dict(left_out)}; change the student's "
                    "tokenizer or train.max_tokens"
                )
            continue
        unused_since = after
        documents.append(encoded)
        num_tokens += encoded.num_tokens
        if num_tokens >= batch_tokens:
            yield GlobalBatch(tuple(documents), after, left_out)
            documents, left_out, num_tokens = [], Counter(), 0


def _encoded_stream(
    reader: DumpReader,
    tokenizer: Tokenizer,
    max_tokens: int,
    start: Position,
    chat: ChatTokenizer | None,
    group: int = 32,
) -> Iterator[tuple[Encoded | str, Position]]:
    """Records encoded `group` at a time: tokenizers are several times faster on batches."""
    waiting: list[tuple[Record, Position]] = []
    for item in reader.records(start):
        waiting.append(item)
        if len(waiting) == group:
            encoded = encode_records([record for record, _ in waiting], tokenizer, max_tokens, chat)
            yield from zip(encoded, [after for _, after in waiting], strict=True)
            waiting = []
