"""A rank's share of each global batch: it reads, encodes and lines up its own documents, and no others.

plan (lengths alone) -> which micro-batches are mine -> their records, read once an epoch -> tokens, targets -> tensors
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakValueDictionary

from pipeline.config import Recipe, TrainConfig, student_config
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.record import Record
from stage2_student.data.batch_plan import BatchPlan, Planned, plan_batches
from stage2_student.data.encode import encode_pieces
from stage2_student.data.examples import Encoded, Masks, make_example
from stage2_student.data.micro_batch import MicroBatch, collate, empty_micro_batch
from stage2_student.data.order import START, VERSION, WHOLE_CHATS, WHOLE_RECORDS, Position, RecordRef
from stage2_student.data.packing import Packing, Rows, plan_micro_batches
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Lengths
from stage2_student.interfaces import Interface
from stage2_student.losses.alm import chunk_tensors


class Sources(NamedTuple):
    """What a run reads, opened."""

    reader: DumpReader
    tokenizer: ByteTokenizer
    chat: ChatTokenizer | None  # None: the dump holds no chats
    ids: SpecialIds


class Share(NamedTuple):
    """What a rank does of a global batch: micro-batches of documents, by their index in the plan."""

    plan: BatchPlan
    micro_batches: Sequence[Rows]

    @property
    def documents(self) -> list[Planned]:
        """In the order of the micro-batches."""
        return [self.plan.documents[i] for rows in self.micro_batches for row in rows for i in row]


def shares(
    plans: Iterable[BatchPlan], micro_batch_tokens: int, packing: Packing, rank: int, world: int
) -> Iterator[Share]:
    """This rank's share of each batch; equally many micro-batches on each rank."""
    for plan in plans:
        lengths = [document.num_tokens for document in plan.documents]
        yield Share(plan, plan_micro_batches(lengths, micro_batch_tokens, world, packing)[rank])


class Held:
    """A record that was read; its pieces, all of them, once the first is due."""

    def __init__(self, record: Record) -> None:
        self.doc_id = record.doc_id
        self.record: Record | None = record
        self.pieces: list[Encoded] = []

    def encode(self, pieces: list[Encoded]) -> None:
        self.record, self.pieces = None, pieces


def fetched(of_rank: Iterable[Share], reader: DumpReader) -> Iterator[tuple[Share, list[Held]]]:
    """Each share with its records, which are read window by window, ascending, once all of a window's batches are
    planned.

    Pieces of one record share what holds it, so that it is read and encoded once for as long as any of them is to come.
    Held in memory: this rank's records of two windows at most, and those of the batches that reach over more.
    """
    lanes = reader.lanes()
    held: WeakValueDictionary[tuple[int, int, int], Held] = WeakValueDictionary()
    waiting: deque[Share] = deque()
    unread: list[RecordRef] = []
    found: dict[RecordRef, Held] = {}
    window = (0, 0)
    for share in of_rank:
        waiting.append(share)
        unread += [document.ref for document in share.documents]
        before, window = window, share.plan.window
        if window == before:
            continue
        due = sorted(ref for ref in unread if ref[:2] < window)
        unread = [ref for ref in unread if ref[:2] >= window]
        for ref in due:
            key = (ref.epoch, ref.shard, ref.row)
            holder = held.get(key) or Held(lanes.record(ref))
            held[key] = found[ref] = holder
        while waiting and all(document.ref in found for document in waiting[0].documents):
            ready = waiting.popleft()
            yield ready, [found.pop(document.ref) for document in ready.documents]


def cut_at(train: TrainConfig, order: int) -> int | None:
    """Tokens above which a record is cut; None: records are not cut in this order."""
    return train.piece_tokens if order > WHOLE_RECORDS else None


def uses_turns(order: int) -> bool:
    """Whether in this order those turns of a chat are used that can be; or it is used whole, or not."""
    return order > WHOLE_CHATS


@dataclass(frozen=True)
class Preparation:
    """How records become this rank's micro-batches."""

    recipe: Recipe
    sources: Sources
    interface: Interface | None
    packing: Packing
    rank: int
    world: int
    order: int = VERSION  # of the order of documents

    def steps(self, lengths: Lengths, start: Position = START) -> Iterator[tuple[BatchPlan, list[MicroBatch]]]:
        """Each global batch, and this rank's share of it as tensors; without end."""
        train = self.recipe.train
        plans = plan_batches(lengths, train.seed, train.batch_tokens, train.piece_tokens, start, self.order)
        of_rank = shares(plans, train.micro_batch_tokens, self.packing, self.rank, self.world)
        for share, records in fetched(of_rank, self.sources.reader):
            yield share.plan, self.micro_batches(share, self.encoded(share, records))

    def encoded(self, share: Share, records: Sequence[Held]) -> list[Encoded]:
        """The share's documents in the student's tokens. Raises ValueError where one has other tokens than were
        counted.
        """
        _, tokenizer, chat, _ = self.sources
        new = {id(held): (held, held.record) for held in records if held.record is not None}
        found = encode_pieces(
            [record for _, record in new.values()],
            tokenizer,
            chat,
            cut_at(self.recipe.train, self.order),
            uses_turns(self.order),
        )
        for (held, _), pieces in zip(new.values(), found, strict=True):
            held.encode(pieces if isinstance(pieces, list) else [])
        documents = []
        for held, planned in zip(records, share.documents, strict=True):
            encoded = next(iter(held.pieces[planned.ref.piece :]), None)
            if encoded is None or encoded.num_tokens != planned.num_tokens:
                now = "it cannot be used" if encoded is None else f"{encoded.num_tokens} tokens"
                raise ValueError(
                    f"document {held.doc_id}: {planned.num_tokens} tokens were counted when the run began, now: {now}. The dump or the "
                    f"tokenizer has changed; put it back, or delete {student_config(self.recipe).path} to start again"
                )
            documents.append(encoded)
        return documents

    def micro_batches(self, share: Share, documents: Sequence[Encoded]) -> list[MicroBatch]:
        """The share as tensors."""
        in_turn = iter(documents)
        return [self._micro_batch(rows, in_turn) for rows in share.micro_batches]

    def _micro_batch(self, rows: Rows, encoded: Iterator[Encoded]) -> MicroBatch:
        student, ids = student_config(self.recipe), self.sources.ids
        masks = Masks(student.max_doubt, student.max_token_end)
        max_bytes = 0 if self.interface is None else self.interface.max_bytes
        documents = [next(encoded) for row in rows for _ in row]
        examples = [make_example(document, ids.document_start, ids.end, max_bytes, masks) for document in documents]
        micro = collate(examples, [len(row) for row in rows]) if examples else empty_micro_batch(ids.document_start)
        extra = {} if self.interface is None else self.interface.prepare(documents, examples, micro)
        if self.recipe.train.objectives.alm:
            extra |= chunk_tensors(documents, micro.layout, self.recipe.train.alm_debias)
        return replace(micro, extra=extra)
