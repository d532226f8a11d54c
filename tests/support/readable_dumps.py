"""A small dump made through the schema alone, with known figures: no model, no tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from schemas import END, SCHEMA_VERSION
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.record import Record, Segment
from schemas.record_checks import record_faults
from schemas.shard import commit_shard, to_table
from schemas.token_alternatives import TokenAlternatives

IDENTITY = {"teacher": {"model": "a <b>teacher</b>"}, "sparsity": {"top_k": 2}}


def make_record(doc_id: str, document: bytes, window_start: int = 0, has_end: bool = True) -> Record:
    """Every position stores its realised symbol with probability 1/2, another with 1/4; tokens are two bytes long."""
    realised = np.frombuffer(document + (bytes([END]) if has_end else b""), dtype=np.uint8)
    lengths = [2] * (len(document) // 2) + [1] * (len(document) % 2)
    num = len(realised)
    symbols = np.stack([realised, np.where(realised == ord("x"), ord("y"), ord("x"))], axis=1).astype(np.uint8)
    return Record(
        doc_id=doc_id,
        window_start=window_start,
        document=document,
        segments=(Segment(0, len(document), has_end),),
        teacher_token_lengths=np.array(lengths, dtype=np.int32),
        teacher_token_logprobs=np.full(len(lengths), -1.0, dtype=np.float32),
        entry_counts=np.full(num, 2, dtype=np.uint16),
        dropped=np.zeros(num, dtype=np.float32),
        token_end=np.full(num, 0.25, dtype=np.float32),
        doubt=np.zeros(num, dtype=np.float32),
        symbols=symbols.ravel(),
        logprobs=np.log(np.tile([0.5, 0.25], num)).astype(np.float32),
    )


def varied_record(doc_id: str, seed: int, document: bytes = b"a document of bytes, with an end") -> Record:
    """Between 1 and 6 entries a position, the realised symbol among them, and some mass left for the tail."""
    rng = np.random.default_rng(seed)
    realised = np.frombuffer(document + bytes([END]), dtype=np.uint8)
    lengths = [2] * (len(document) // 2) + [1] * (len(document) % 2)
    counts = rng.integers(1, 7, len(realised)).astype(np.uint16)
    symbols, logprobs = [], []
    for symbol, count in zip(realised.tolist(), counts.tolist(), strict=True):
        others = rng.choice(np.delete(np.arange(256), symbol), count - 1, replace=False).tolist()
        probs = np.sort(rng.dirichlet(np.ones(count + 1))[:count])[::-1]
        symbols += rng.permutation([symbol, *others]).tolist()
        logprobs += np.log(np.maximum(0.99 * probs, 1e-3)).tolist()
    num = len(realised)
    return Record(
        doc_id=doc_id,
        window_start=0,
        document=document,
        segments=(Segment(0, len(document), True),),
        teacher_token_lengths=np.array(lengths, dtype=np.int32),
        teacher_token_logprobs=np.full(len(lengths), -1.0, dtype=np.float32),
        entry_counts=counts,
        dropped=np.zeros(num, dtype=np.float32),
        token_end=np.zeros(num, dtype=np.float32),
        doubt=np.zeros(num, dtype=np.float32),
        symbols=np.array(symbols, dtype=np.uint8),
        logprobs=np.minimum(np.array(logprobs), 0).astype(np.float32),
    )


def with_tokens(record: Record, top_k: int = 4, vocabulary: int = 300) -> Record:
    """Add random alternatives of a record's tokens; the first token of every other record has none."""
    rng = np.random.default_rng(len(record.document))
    counts_T = np.full(len(record.teacher_token_lengths), top_k)
    counts_T[:1] = 0 if record.window_start else top_k
    offsets = np.concatenate([[0], counts_T.cumsum()])
    ids = np.concatenate([np.empty(0), *(rng.permutation(vocabulary)[:count] for count in counts_T)])
    probs = [np.sort(rng.dirichlet(np.ones(count + 1))[:count])[::-1] for count in counts_T if count]
    token_ids = np.where(counts_T > 0, ids[np.minimum(offsets[:-1] + rng.integers(0, top_k), len(ids) - 1)], -1)
    ends = rng.uniform(-20, 0, len(counts_T) + 1)
    ends[0] = np.nan if record.window_start else ends[0]
    tokens = TokenAlternatives(
        offsets,
        ids.astype(np.int32),
        np.log(np.maximum(np.concatenate([np.empty(0), *probs]), 1e-9)).astype(np.float32),
        token_ids.astype(np.int32),
        record.teacher_token_logprobs,
        ends.astype(np.float32),
    )
    return replace(record, tokens=tokens)


def cut_positions(record: Record, start: int) -> Record:
    """Keep the record's segment and stored values from byte `start` on only; two entries a position."""
    [segment] = record.segments
    return replace(
        record,
        segments=(Segment(start, segment.length - start, segment.has_end),),
        entry_counts=record.entry_counts[start:],
        dropped=record.dropped[start:],
        token_end=record.token_end[start:],
        doubt=record.doubt[start:],
        symbols=record.symbols[2 * start :],
        logprobs=record.logprobs[2 * start :],
    )


def write_dump(
    folder: Path,
    shards: Sequence[Sequence[Record]],
    num_planned: int | None = None,
    identity: Mapping[str, Any] = IDENTITY,
    version: int = SCHEMA_VERSION,
) -> Path:
    """Write a dump of these records, a shard each, without a summary, in a version of the format."""
    (folder / "shards").mkdir(parents=True)
    plans = tuple(
        ShardPlan(index=i, first_document=i, num_documents=1, num_bytes=1, sha256=str(i))
        for i in range(num_planned or len(shards))
    )
    counts = {"documents": 3, "left out: empty": 7}
    Manifest(schema_version=version, identity=dict(identity), corpus_counts=counts, shards=plans).save(folder)
    for plan, records in zip(plans, shards, strict=False):
        assert not [fault for record in records for fault in record_faults(record)]
        commit_shard(to_table(records, identity, version), plan.path(folder), zstd_level=1)
    return folder


def make_dump(folder: Path) -> Path:
    """Write three documents, one in two windows; two shards are done, a third is planned."""
    shards = [
        [make_record("alpha", "a b\né".encode())],
        [
            make_record("beta", b"hello", has_end=False),
            make_record("beta", b" you", window_start=5),
            make_record("gamma", b"x"),
        ],
    ]
    return write_dump(folder, shards, num_planned=3)


def finish(dump: Path) -> Path:
    """Write the summary of a dump whose shards are complete, as stage 1 would."""
    manifest = Manifest.load(dump)
    shards = [
        {
            "name": shard.path(dump).name,
            "bytes": shard.path(dump).stat().st_size,
            "sha256": hashlib.sha256(shard.path(dump).read_bytes()).hexdigest(),
        }
        for shard in manifest.shards
    ]
    write_json(dump / "summary.json", {"documents": 3, "records": 4, "shards": shards})
    return dump
