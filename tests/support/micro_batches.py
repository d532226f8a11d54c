"""Global batches of one process: documents in the student's tokens, read and counted in memory."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.data.batch_plan import plan_batches
from stage2_student.data.encode import Tokenizer, encode_pieces
from stage2_student.data.examples import Encoded
from stage2_student.data.order import START, Position
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Lengths, RecordSource, count_records
from stage2_student.distributed.dealt_reading import LocalReading
from stage2_student.training.rank_batches import rank_batches, with_records


class GlobalBatch(NamedTuple):
    """The documents of one optimizer step."""

    documents: tuple[Encoded, ...]
    after: Position
    left_out: Counter[str]


def count_all(
    reader: RecordSource, tokenizer: Tokenizer, max_tokens: int | None = None, with_bytes: bool = False
) -> Lengths:
    """Tokens of all records, in this process; longer ones than `max_tokens` cut."""
    how = None, max_tokens, True, with_bytes
    return Lengths.of(
        list(count_records(reader.record_texts(shard), tokenizer, *how)) for shard in range(reader.num_shards)
    )


def global_batches(
    reader: DumpReader, tokenizer: ByteTokenizer, batch_tokens: int, max_tokens: int, start: Position = START
) -> Iterator[GlobalBatch]:
    """Yield a run's batches in turn, endlessly."""
    lengths = count_all(reader, tokenizer, max_tokens)
    plans = plan_batches(lengths, reader.seed, batch_tokens, max_tokens, start)
    for share, records in with_records(rank_batches(plans, 10**9, "off", 0, 1), LocalReading([reader])):
        for held in records:
            if held.record is not None:
                [pieces] = encode_pieces([held.record], tokenizer, None, max_tokens)
                assert isinstance(pieces, list)
                held.set_pieces(pieces)
        documents = tuple(h.pieces[p.ref.piece] for h, p in zip(records, share.documents, strict=True))
        yield GlobalBatch(documents, share.plan.after, share.plan.left_out)


def pieces_of(counts: Lengths, shard: int, count: int) -> list[tuple[int, int]]:
    """Return (row, piece) of the first `count` pieces of a shard."""
    found = counts.rows(np.full(count, shard), np.arange(count))
    return list(zip(*(column.tolist() for column in found), strict=True))
