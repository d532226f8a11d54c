"""A rank's share of each global batch: it encodes and aligns its own documents only.

plan (by lengths alone) -> this rank's micro-batches -> their records -> tokens, targets -> tensors
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from pipeline.config import Recipe, TrainConfig, student_config
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.record import Record
from stage2_student.data.batch_plan import BatchPlan, Planned, Share, UnionPosition, plan_batches, plan_union
from stage2_student.data.encode import encode_pieces
from stage2_student.data.examples import Encoded
from stage2_student.data.micro_batch import MicroBatch
from stage2_student.data.order import START, VERSION, WHOLE_CHATS, WHOLE_RECORDS, Order, Position, RecordRef
from stage2_student.data.packing import Packing, Rows, own_micro_batches, plan_micro_batches
from stage2_student.data.token_counts import Lengths
from stage2_student.data.union import Member
from stage2_student.distributed.dealt_reading import DealtReading, LocalReading, ReaderOf, Records
from stage2_student.interfaces import Interface
from stage2_student.losses.micro_batches import MicroBatchMaker
from stage2_student.losses.token_objective import TokenObjective


class Sources(NamedTuple):
    """The opened inputs of a run."""

    members: Sequence[Member]  # at least one; several are a union
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None  # None: the dumps hold no chats
    ids: SpecialIds


class RankBatch(NamedTuple):
    """A rank's share of a global batch: micro-batches of documents, by their index in the plan."""

    plan: BatchPlan
    micro_batches: Sequence[Rows]

    @property
    def documents(self) -> list[Planned]:
        """The documents in the order of the micro-batches."""
        return [self.plan.documents[i] for rows in self.micro_batches for row in rows for i in row]


def rank_batches(
    plans: Iterable[BatchPlan], micro_batch_tokens: int, packing: Packing, rank: int, world: int
) -> Iterator[RankBatch]:
    """Yield this rank's share of each batch; every rank has the same number of micro-batches."""
    for plan in plans:
        is_union = isinstance(plan.after, UnionPosition)
        if packing == "off" and not is_union:
            yield RankBatch(plan, own_micro_batches(plan.token_counts, micro_batch_tokens, rank, world))
            continue
        by_corpus = [document.ref.corpus for document in plan.documents] if is_union else None
        yield RankBatch(plan, plan_micro_batches(plan.lengths, micro_batch_tokens, world, packing, by_corpus)[rank])


class HeldRecord:
    """A record that was read; once its first piece is due, all of its pieces, encoded."""

    def __init__(self, record: Record) -> None:
        self.doc_id = record.doc_id
        self.record: Record | None = record
        self.pieces: list[Encoded] = []

    def set_pieces(self, pieces: list[Encoded]) -> None:
        """Keep the encoded pieces, and drop the record."""
        self.record, self.pieces = None, pieces


def with_records(
    batches: Iterable[RankBatch], source: Records, reader_of: ReaderOf = lambda _: 0, num_corpora: int = 1, lag: int = 0
) -> Iterator[tuple[RankBatch, list[HeldRecord]]]:
    """Yield each batch with its records, which are read in order, window by window, once a window is fully planned.

    Pieces of one record share its `HeldRecord`, so that it is read and encoded once while any of them is still to come.
    Held in memory: this rank's records of at most two windows, and those of batches that span more.

    Args:
        reader_of: the rank that reads a record's shard, if several share the reading.
        lag: the number of batches by which another rank may be behind this one; what was read for those before them is
            forgotten.
    """
    held: WeakValueDictionary[tuple[int, int, int, int], HeldRecord] = WeakValueDictionary()
    waiting: deque[RankBatch] = deque()
    unread: list[RecordRef] = []
    read: dict[RecordRef, HeldRecord] = {}
    windows = ((0, 0),) * num_corpora
    passed: deque[tuple[tuple[int, int], ...]] = deque(maxlen=lag + 1)
    for batch in batches:
        waiting.append(batch)
        unread += [document.ref for document in batch.documents]
        before, windows = windows, batch.plan.windows
        if windows == before:
            continue
        due = sorted(ref for ref in unread if ref[:2] < windows[ref.corpus])
        unread = [ref for ref in unread if ref[:2] >= windows[ref.corpus]]
        records = {key: record for ref in due if (record := held.get(key := _record_of(ref))) is not None}
        new = {key: ref for ref in reversed(due) if (key := _record_of(ref)) not in records}
        found = source.records(sorted(new.values()), reader_of)
        records |= {key: HeldRecord(found[ref]) for key, ref in new.items()}
        held.update(records)
        read |= {ref: records[_record_of(ref)] for ref in due}
        while waiting and all(document.ref in read for document in waiting[0].documents):
            ready = waiting.popleft()
            passed.append(ready.plan.windows)
            if len(passed) > lag:
                source.forget(passed[0])
            yield ready, [read.pop(document.ref) for document in ready.documents]


def _record_of(ref: RecordRef) -> tuple[int, int, int, int]:
    return ref.corpus, ref.epoch, ref.shard, ref.row


def cut_at(train: TrainConfig, order: int) -> int | None:
    """Return the number of tokens above which a record is cut; None if records are not cut in this order."""
    return train.piece_tokens if order > WHOLE_RECORDS else None


def uses_turns(order: int) -> bool:
    """Tell whether this order uses the usable turns of a chat; otherwise a chat is used whole or not at all."""
    return order > WHOLE_CHATS


@dataclass(frozen=True)
class BatchBuilder:
    """The builder of this rank's micro-batches from records."""

    recipe: Recipe
    sources: Sources
    interface: Interface | None
    packing: Packing
    rank: int
    world: int
    order: int = VERSION  # version of the order of documents
    dealt: DealtReading | None = None  # the ranks' shared reading; None: this rank reads all that it needs
    on_tokens: Mapping[str, TokenObjective] = field(default_factory=dict)  # the student's objectives on tokens

    def steps(
        self, lengths: Sequence[Lengths], start: Position | UnionPosition = START
    ) -> Iterator[tuple[BatchPlan, list[MicroBatch]]]:
        """Yield each global batch with this rank's share of it as tensors, endlessly.

        Args:
            lengths: of each corpus.
        """
        train = self.recipe.train
        batches = rank_batches(
            self._plans(lengths, start), train.micro_batch_tokens, self.packing, self.rank, self.world
        )
        members = self.sources.members
        source: Records = self.dealt or LocalReading([member.reader for member in members])
        # A rank waits for the others at each step, and reads `prefetch` steps ahead, beside the one being made.
        lag = train.prefetch + 4
        for batch, records in with_records(batches, source, self._reader_of(lengths), len(members), lag):
            yield batch.plan, self.micro_batches(batch, self.encoded(batch, records))

    def _reader_of(self, lengths: Sequence[Lengths]) -> ReaderOf:
        """Return the function that tells the rank by which a record is read."""
        orders = [Order(self.recipe.train.seed, of.counts_S, None, self.order) for of in lengths]
        first = np.cumsum([0, *(len(of.counts_S) for of in lengths)])  # corpora begin with different ranks

        @lru_cache(maxsize=4 * len(orders))
        def readers(corpus: int, epoch: int) -> np.ndarray:
            return (orders[corpus].readers(epoch, self.world) + first[corpus]) % self.world

        return lambda ref: int(readers(ref.corpus, ref.epoch)[ref.shard])

    def _plans(self, lengths: Sequence[Lengths], start: Position | UnionPosition) -> Iterator[BatchPlan]:
        train, members = self.recipe.train, self.sources.members
        sizes = (train.seed, train.batch_tokens, train.piece_tokens)
        if len(members) == 1:
            assert isinstance(start, Position)
            return plan_batches(lengths[0], *sizes, start, self.order)
        shares = [Share(of, member.weight, member.name) for of, member in zip(lengths, members, strict=True)]
        return plan_union(shares, *sizes, start if isinstance(start, UnionPosition) else None, self.order)

    def encoded(self, batch: RankBatch, records: Sequence[HeldRecord]) -> list[Encoded]:
        """Encode the batch's documents in the student's tokens.

        Raises ValueError if one has another number of tokens than was counted.
        """
        _, tokenizer, chat, _ = self.sources
        new = {id(held): (held, held.record) for held in records if held.record is not None}
        pieces_of_new = encode_pieces(
            [record for _, record in new.values()],
            tokenizer,
            chat,
            cut_at(self.recipe.train, self.order),
            uses_turns(self.order),
        )
        for (held, _), pieces in zip(new.values(), pieces_of_new, strict=True):
            held.set_pieces(pieces if isinstance(pieces, list) else [])
        documents = []
        for held, planned in zip(records, batch.documents, strict=True):
            encoded = next(iter(held.pieces[planned.ref.piece :]), None)
            if encoded is None or encoded.num_tokens != planned.num_tokens:
                now = "it cannot be used" if encoded is None else f"{encoded.num_tokens} tokens"
                raise ValueError(
                    f"document {held.doc_id}: {planned.num_tokens} tokens were counted when the run began, now: {now}. "
                    "The dump or the tokenizer has changed; restore it, or delete "
                    f"{student_config(self.recipe).path} to start over"
                )
            documents.append(encoded)
        return documents

    def micro_batches(self, batch: RankBatch, documents: Sequence[Encoded]) -> list[MicroBatch]:
        """Build the batch's tensors."""
        remaining = iter(documents)
        made_for = student_config(self.recipe), self.recipe.train, self.sources.ids, self.interface
        make = MicroBatchMaker(*made_for, self.on_tokens, self.sources.tokenizer.token_bytes)
        micro_batches = []
        for rows in batch.micro_batches:
            numbers = [number for row in rows for number in row]
            micro = make([next(remaining) for _ in numbers], list(map(len, rows)))
            corpora = {batch.plan.documents[number].ref.corpus for number in numbers}  # at most one
            micro_batches.append(replace(micro, corpus=max(corpora, default=0)))
        return micro_batches
