"""A small dump made through the schema alone, with known figures: no model, no tokenizer."""

from pathlib import Path

import numpy as np

from schemas import END, coding
from schemas.manifest import Manifest, ShardPlan
from schemas.shard import Record, Segment, commit_shard, to_table

IDENTITY = {"teacher": {"model": "a <b>teacher</b>"}, "sparsity": {"top_k": 2}}


def make_record(doc_id: str, document: bytes, window_start: int = 0, has_end: bool = True) -> Record:
    """Every position stores its realised symbol with probability 1/2, another with 1/4; tokens are two bytes long."""
    realised = np.frombuffer(document + (bytes([END]) if has_end else b""), dtype=np.uint8)
    lengths = [2] * (len(document) // 2) + [1] * (len(document) % 2)
    num = len(realised)
    entries = np.stack([realised, np.where(realised == ord("x"), ord("y"), ord("x"))], axis=1).astype(np.uint8)
    return Record(
        doc_id=doc_id,
        window_start=window_start,
        document=document,
        segments=(Segment(0, len(document), has_end),),
        teacher_token_lengths=np.array(lengths, dtype=np.int32),
        teacher_token_codes=coding.encode_token_logprobs(np.full(len(lengths), -1.0)),
        dropped_codes=np.zeros(num, dtype=np.uint8),
        token_end_codes=coding.encode_shares(np.full(num, 0.25)),
        doubt_codes=np.zeros(num, dtype=np.uint8),
        **coding.encode_entries(coding.Entries(np.full(num, 2), entries.ravel(), np.tile([0.5, 0.25], num)))._asdict(),
    )


def make_dump(folder: Path) -> Path:
    """Three documents, one of them in two windows; two shards are done, a third is planned."""
    (folder / "shards").mkdir(parents=True)
    shards = [
        [make_record("alpha", "a b\né".encode())],
        [
            make_record("beta", b"hello", has_end=False),
            make_record("beta", b" you", window_start=5),
            make_record("gamma", b"x"),
        ],
    ]
    plans = tuple(ShardPlan(index=i, first_document=i, num_documents=1, num_bytes=1, sha256="0") for i in range(3))
    Manifest(identity=IDENTITY, corpus_counts={"documents": 3, "left out: empty": 7}, shards=plans).save(folder)
    for plan, records in zip(plans, shards, strict=False):
        assert not [fault for record in records for fault in record.faults()]
        commit_shard(to_table(records, IDENTITY), plan.path(folder), zstd_level=1)
    return folder
