"""Spans, examples, micro-batches and the reader."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import END
from schemas.record import Segment
from stage2_student.data.batch_plan import plan_batches
from stage2_student.data.encode import encode_records
from stage2_student.data.examples import NO_LABEL, Encoded, Masks, make_example
from stage2_student.data.micro_batch import collate
from stage2_student.data.packing import plan_micro_batches
from stage2_student.data.reader import DumpReader
from stage2_student.data.spans import supervised_tokens, token_spans
from stage2_student.interfaces import StudentShape
from stage2_student.interfaces.linear import LinearInterface
from stage2_student.losses.alm import chunk_tensors
from stage2_student.model.initial_student import load_start
from stage2_student.model.student import Student
from tests.support.micro_batches import count_all, global_batches
from tests.support.small_dumps import make_dump, make_record

MASKS = Masks(max_doubt=1.0, max_token_end=0.05)


def encoded(document: bytes, tokens: list[bytes], segments: list[Segment]) -> Encoded:
    record = make_record("d", document, np.random.default_rng(0), segments)
    spans = token_spans(tokens, document)
    starts, ends = (np.array([getattr(s, name) for s in spans]) for name in ("start", "stop"))
    return Encoded(record, np.arange(len(tokens)), starts, ends)


def test_spans_leave_out_the_prefix() -> None:
    assert token_spans([b" ", b"ab", b"c"], b"abc", b" ") == [range(0), range(2), range(2, 3)]
    assert token_spans([b" ab", b"c"], b"abc", b" ") == [range(2), range(2, 3)]
    with pytest.raises(ValueError, match="spell 2 bytes"):
        token_spans([b"ab"], b"abc")


def test_every_byte_of_a_supervised_token_has_its_own_target() -> None:
    item = encoded("a café!".encode(), [b"a", b" caf\xc3", b"\xa9!"], [Segment(0, 8, True)])
    example = make_example(item, 77, 99, 10, MASKS)
    assert example.tokens_L.tolist() == [77, 0, 1, 2] and example.labels_L.tolist() == [0, 1, 2, 99]
    assert bytes(example.symbols_P[:-1].tolist()) == item.record.document and example.symbols_P[-1] == END
    assert example.state_P.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 3]
    assert example.offset_P.tolist() == [0, 0, 1, 2, 3, 4, 0, 1, 0]
    assert example.num_bytes == 8
    assert (
        example.entry_symbols_PE[:, 0] == example.symbols_P
    ).all()  # the synthetic dump stores the realised one first
    assert (example.kl_P == (item.record.token_end <= 0.05)).all()


def test_a_token_partly_outside_a_segment_is_not_supervised() -> None:
    item = encoded(b"abcdefgh", [b"ab", b"cd", b"ef", b"gh"], [Segment(1, 4, True), Segment(6, 2, True)])
    example = make_example(item, 77, 99, 10, MASKS)
    assert example.labels_L.tolist() == [NO_LABEL, 1, NO_LABEL, 3, 99]  # the first END lies inside "ef"
    assert example.symbols_P.tolist() == [*b"cdgh", END] and example.num_bytes == 4
    assert (example.entry_symbols_PE[:, 0] == example.symbols_P).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_token_is_supervised_where_all_its_bytes_or_its_place_lie_in_one_segment(seed: int) -> None:
    """Byte by byte; segments may be empty (a turn that is END alone), and so may tokens (a prefix)."""
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.integers(0, 8, size=7))  # equal ones make empty tokens
    edges = np.sort(rng.integers(0, 9, size=6)).reshape(-1, 2).tolist()
    segments = [Segment(start, end - start, True) for start, end in edges]
    starts, ends = bounds[:-1], bounds[1:]

    def lies_in(start: int, end: int, segment: Segment) -> bool:
        inside = range(segment.start, segment.start + segment.length) or range(segment.start, segment.start + 1)
        return start in inside and (start == end or (segment.length > 0 and end - 1 in inside))

    found = supervised_tokens(starts, ends, segments).tolist()
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    assert found == [any(lies_in(start, end, segment) for segment in segments) for start, end in pairs]


def test_only_the_first_ten_bytes_of_a_token_feed_the_interface() -> None:
    example = make_example(encoded(b"x" * 14, [b"x" * 14], [Segment(0, 14, False)]), 77, 99, 10, MASKS)
    assert example.offset_P.tolist() == list(range(10)) and example.num_bytes == 14


def gradient(model: Path, dump: Path, micro_batch_tokens: int, train: TrainConfig) -> tuple[torch.Tensor, int]:
    tokenizer = ByteTokenizer.load(str(model))
    batch = next(global_batches(DumpReader(dump, 0), tokenizer, 300, 512))
    interface = LinearInterface(StudentShape(64, 269, tokenizer.token_bytes, b"", (268,)))
    student = Student(load_start(model, False), interface, train)
    torch.nn.init.normal_(interface.maps.weight, generator=torch.Generator().manual_seed(0))
    [plan] = plan_micro_batches([d.num_tokens for d in batch.documents], micro_batch_tokens, 1)
    for rows in plan:
        documents = [batch.documents[i] for [i] in rows]
        micro = collate([make_example(document, 268, 268, 10, MASKS) for document in documents])
        nats, _ = student(replace(micro, extra=chunk_tensors(documents, micro.layout, 0.1)))
        nats.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]), len(plan)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"objectives": {"ce": 0, "byte_ce": 0, "kl": 1}, "kl_direction": "reverse", "kl_temperature": 2},
        {"objectives": {"ce": 0, "byte_ce": 1, "kl": 1}, "kl_direction": "jensen_shannon"},
        {"objectives": {"ce": 0, "byte_ce": 0.5, "kl": 0, "alm": 20}},
    ],
)
def test_splitting_a_batch_leaves_the_gradient_unchanged(train: dict[str, Any], model: Path, tmp_path: Path) -> None:
    dump = make_dump(tmp_path / "dump")
    config = TrainConfig.model_validate({"dtype": "float32", **train})
    (whole, one), (split, many) = (gradient(model, dump, tokens, config) for tokens in (10**6, 40))
    assert one < many and whole.any()
    # Of the whole gradient, not of each element: float32 sums in another order, and some elements are sums of
    # cancelling terms.
    assert (whole - split).norm() <= 1e-5 * whole.norm()


def test_reader_resumes_from_every_position(tmp_path: Path) -> None:
    reader = DumpReader(make_dump(tmp_path / "dump", 12, 3), seed=1)
    stream = [(record.doc_id, after) for record, after in islice(reader.records(), 30)]
    for at, (_, after) in enumerate(stream[:-2]):
        assert [r.doc_id for r, _ in islice(reader.records(after), 2)] == [name for name, _ in stream[at + 1 : at + 3]]
    epochs = [[name for name, _ in stream[i : i + 12]] for i in (0, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_reader_refuses_a_dump_with_a_missing_shard(tmp_path: Path) -> None:
    dump = make_dump(tmp_path / "dump")
    (dump / "shards" / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards is missing \(part-00001.parquet\); run `bld teacher` again"):
        DumpReader(dump, 0)


def test_documents_that_cannot_be_used_are_counted_by_reason(model: Path, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer.load(str(model))
    rng = np.random.default_rng(0)
    records = [make_record("long", b"abc " * 20, rng), make_record("good", b"abc", rng)]
    records.append(replace(records[1], document=b"\xc3"))
    long, good, broken = encode_records(records, tokenizer, 16)
    assert long == "longer than train.max_tokens" and broken == "the student's tokenizer cannot spell it"
    assert isinstance(good, Encoded) and good.num_tokens == 4
    with pytest.raises(ValueError, match="no record of the dump can be used"):
        next(plan_batches(count_all(DumpReader(make_dump(tmp_path / "dump"), 0), tokenizer), 0, 300, 1))
