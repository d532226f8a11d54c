"""Batches of each rank: planned by lengths alone, the same over all ranks in any world."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.shard import read_rows
from stage2_student.data import order as order_module
from stage2_student.data import reader as reader_module
from stage2_student.data.batch_plan import plan_batches
from stage2_student.data.encode import TOO_LONG
from stage2_student.data.order import START, Order, Position
from stage2_student.data.reader import DumpReader
from stage2_student.data.union import Member
from stage2_student.training.rank_batches import BatchBuilder, Sources
from tests.support.micro_batches import count_all, global_batches, pieces_of
from tests.support.small_dumps import make_recipe, make_work

SMALL_WINDOW = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(work / "model"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows small, so that a dump of 60 records has several, which end inside shards."""
    monkeypatch.setattr(order_module, "WINDOW_PIECES", SMALL_WINDOW)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of all records read from now on."""
    names: list[str] = []

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for record in read_rows(*arguments, **options):
            names.append(record.doc_id)
            yield record

    monkeypatch.setattr(reader_module, "read_rows", watched)
    return names


def builder(work: Path, tokenizer: ByteTokenizer, rank: int, world: int, **train: Any) -> BatchBuilder:
    recipe = make_recipe(work / "dump", work / "model", work / "run", {"objectives": {"alm": 1.0}} | train)
    sources = Sources([Member(DumpReader(work / "dump", 0))], tokenizer, None, SpecialIds(268, (268,)))
    return BatchBuilder(recipe, sources, None, "off", rank, world)


def test_every_document_is_seen_once_per_epoch_over_changes_of_world_and_micro_batch(
    work: Path, tokenizer: ByteTokenizer
) -> None:
    """Resumed after every second step in another world, over some epochs."""
    reader = DumpReader(work / "dump", seed=0)
    counts = count_all(reader, tokenizer)
    position, seen = START, Counter[str]()
    for world, micro_batch_tokens in [(2, 60), (1, 200), (3, 30), (4, 90), (2, 45)] * 3:
        batches = list(islice(global_batches(reader, tokenizer, 120, 512, position), 2))
        of_step = [Counter[str](), Counter[str]()]
        for rank in range(world):
            of_rank = builder(work, tokenizer, rank, world, micro_batch_tokens=micro_batch_tokens)
            for found, batch, (plan, micro_batches) in zip(
                of_step, batches, of_rank.steps([counts], position), strict=False
            ):
                assert (plan.after, plan.left_out) == (batch.after, batch.left_out)
                found.update(name for micro in micro_batches for name in micro.doc_ids)
        for found, batch in zip(of_step, batches, strict=True):
            assert found == Counter(document.record.doc_id for document in batch.documents)
        seen, position = seen + of_step[0] + of_step[1], batches[-1].after
    assert position.epoch > 0 and len(seen) == 60
    assert set(seen.values()) <= {position.epoch, position.epoch + 1}
    assert seen == Counter(record.doc_id for record, _ in islice(reader.records(START), sum(seen.values())))


def test_a_rank_reads_and_encodes_its_own_documents_and_no_others(
    work: Path, tokenizer: ByteTokenizer, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_all(DumpReader(work / "dump", 0), tokenizer)
    encoded: list[bytes] = []
    encode_batch = ByteTokenizer.encode_batch
    monkeypatch.setattr(
        ByteTokenizer,
        "encode_batch",
        lambda self, documents: encoded.extend(documents) or encode_batch(self, documents),
    )
    trained: list[str] = []
    for plan, micro_batches in builder(work, tokenizer, 1, 3).steps([counts]):
        trained += [name for micro in micro_batches for name in micro.doc_ids]
        if plan.after.epoch == 2:
            break
    assert len(trained) == len(encoded)
    ahead = Counter(read) - Counter(trained)
    assert not Counter(trained) - Counter(read) and ahead.total() <= 2 * SMALL_WINDOW
    assert 0.2 < len(trained) / 120 < 0.5


@pytest.mark.parametrize("version", order_module.READ)
def test_the_order_takes_each_record_once_an_epoch_and_goes_on_from_every_position(version: int) -> None:
    counts_S = np.array([3, 0, 20, 1, 13])
    order = Order(1, counts_S, None, version)

    def places(start: Position) -> Iterator[tuple[int, int, int]]:
        for window in order.windows(start):
            for index, (shard, row) in enumerate(zip(window.shard_W, window.unit_W, strict=True)):
                if (window.epoch, window.first + index) >= start:
                    yield window.epoch, int(shard), int(row)

    every = {(shard, row) for shard, count in enumerate(counts_S) for row in range(count)}
    stream = list(islice(places(START), 37 * 3))
    epochs = [stream[i : i + 37] for i in (0, 37, 74)]
    for epoch, taken in enumerate(epochs):
        assert {(shard, row) for _, shard, row in taken} == every and {place[0] for place in taken} == {epoch}
    assert len({tuple(place[1:] for place in taken) for taken in epochs}) == 3
    for at in range(74):
        assert list(islice(places(Position(*divmod(at, 37))), 37)) == stream[at : at + 37]


class Changed:
    """A tokenizer with one token more."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.token_bytes, self.prefix, self.sha256 = tokenizer.token_bytes, tokenizer.prefix, "other"
        self._encode = tokenizer.encode_batch

    def encode_batch(self, documents: list[bytes]) -> list[Any]:
        return [[*ids, 5] if isinstance(ids, list) else ids for ids in self._encode(documents)]


def test_long_records_are_trained_on_in_pieces_each_once_an_epoch_over_all_ranks(
    work: Path, tokenizer: ByteTokenizer, read: list[str]
) -> None:
    counts = count_all(DumpReader(work / "dump", 0), tokenizer, 20)
    assert len(counts.pieces_C) > 20 and counts.num_records == 60 and not counts.reasons
    trained: list[int] = []
    for rank in range(2):
        for plan, micro_batches in builder(work, tokenizer, rank, 2, max_tokens=20).steps([counts]):
            if plan.after.epoch:
                break
            trained.append(sum(micro.num_bytes for micro in micro_batches))
            assert max(micro.tokens_BL.shape[1] for micro in micro_batches) <= 20
    assert len(read) < 60 * 2 + 60  # a record is read by a rank once in a window, not once for each of its pieces
    plans = list(takewhile(lambda plan: not plan.after.epoch, plan_batches(counts, 0, 120, 20)))
    of_rank = builder(work, tokenizer, 1, 2, max_tokens=20)
    straight = [micro_batches for _, micro_batches in islice(of_rank.steps([counts]), 5)]
    for at, plan in enumerate(plans[:4], 1):  # resumed in the middle of documents
        resumed = next(of_rank.steps([counts], plan.after))[1]
        for ours, theirs in zip(resumed, straight[at], strict=True):
            assert ours.doc_ids == theirs.doc_ids and torch.equal(ours.tokens_BL, theirs.tokens_BL)
    taken = [planned.ref[4:7] for plan in plans for planned in plan.documents]
    pieces = {
        (shard, *place) for shard, count in enumerate(counts.counts_S) for place in pieces_of(counts, shard, int(count))
    }
    assert len(set(taken)) == len(taken) and set(taken) <= pieces and len(taken) > len(pieces) - 20
    # All bytes of the documents, but those of the last step, which reaches into the next epoch.
    left = len(pieces) - len(taken)
    assert counts.num_bytes - left * 120 <= sum(trained) <= counts.num_bytes


def test_a_run_that_began_with_whole_records_leaves_long_ones_out_as_it_did(
    work: Path, tokenizer: ByteTokenizer
) -> None:
    reader = DumpReader(work / "dump", 0)
    counts = count_all(reader, tokenizer)
    short = {row for row in range(60) if counts.tokens_U[row] <= 40}
    assert 20 < len(short) < 60
    order = Order(0, counts.counts_S, None, order_module.WHOLE_RECORDS)
    windows = list(takewhile(lambda window: window.epoch < 1, order.windows()))
    in_turn = [f"d{shard * 12 + row}" for w in windows for shard, row in zip(w.shard_W, w.unit_W, strict=True)]
    expected = [name for name in in_turn if int(name[1:]) in short]
    ours = replace(builder(work, tokenizer, 0, 1, max_tokens=40), order=order_module.WHOLE_RECORDS)
    trained: list[str] = []
    left_out = Counter[str]()
    for plan, micro_batches in ours.steps([counts]):
        names = [name for micro in micro_batches for name in micro.doc_ids]
        assert sorted(names) == sorted((expected * 2)[len(trained) : len(trained) + len(names)]) or plan.after.epoch
        trained += names
        left_out += plan.left_out
        if plan.after.epoch:
            break
    assert len(trained) >= len(expected) and left_out[TOO_LONG] >= 60 - len(short)


def test_a_document_with_other_tokens_than_were_counted_stops_the_run_by_name(
    work: Path, tokenizer: ByteTokenizer
) -> None:
    counts = count_all(DumpReader(work / "dump", 0), Changed(tokenizer))
    with pytest.raises(ValueError, match=r"document d\d+: \d+ tokens were counted when the run began, now: \d+ tokens"):
        next(builder(work, tokenizer, 0, 1).steps([counts]))
