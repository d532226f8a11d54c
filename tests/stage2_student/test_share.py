"""What each rank reads, encodes and trains on: planned by lengths alone, the same over all ranks in any world."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.tokenizer_bytes import ByteTokenizer
from schemas.shard import read_rows, read_shard
from stage2_student import lengths as lengths_module
from stage2_student import order as order_module
from stage2_student import reader as reader_module
from stage2_student.encode import TOO_LONG
from stage2_student.lengths import Lengths, count_shard, keep_counts, kept_counts
from stage2_student.order import START, Order, Position
from stage2_student.plan import BatchPlan, plan_batches
from stage2_student.reader import DumpReader
from stage2_student.share import Preparation, Sources
from stage2_student.start import Ends
from tests.stage2_student.batches import count_all, global_batches
from tests.stage2_student.dumps import make_dump, make_recipe
from tests.tiny import tiny_model

SMALL_WINDOW = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    make_dump(work / "dump", num_records=60, num_shards=5)
    return work


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(work / "model"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a dump of 60 records has several, which end inside shards."""
    monkeypatch.setattr(order_module, "WINDOW_RECORDS", SMALL_WINDOW)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all records that are read from now on."""
    names: list[str] = []

    def watched(*arguments: Any) -> Iterator[Any]:
        for record in read_rows(*arguments):
            names.append(record.doc_id)
            yield record

    monkeypatch.setattr(reader_module, "read_rows", watched)
    return names


def preparation(work: Path, tokenizer: ByteTokenizer, rank: int, world: int, **train: Any) -> Preparation:
    recipe = make_recipe(work / "dump", work / "model", work / "run", {"objectives": {"alm": 1.0}} | train)
    sources = Sources(DumpReader(work / "dump", 0), tokenizer, None, Ends(268, 268))
    return Preparation(recipe, sources, None, "off", rank, world)


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
            of_rank = preparation(work, tokenizer, rank, world, micro_batch_tokens=micro_batch_tokens)
            for found, batch, (plan, micro_batches) in zip(
                of_step, batches, of_rank.steps(counts, position), strict=False
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
    for plan, micro_batches in preparation(work, tokenizer, 1, 3).steps(counts):
        trained += [name for micro in micro_batches for name in micro.doc_ids]
        if plan.after.epoch == 2:
            break
    assert len(trained) == len(encoded)
    ahead = Counter(read) - Counter(trained)
    assert not Counter(trained) - Counter(read) and ahead.total() <= 2 * SMALL_WINDOW
    assert 0.2 < len(trained) / 120 < 0.5


def test_the_order_takes_each_record_once_an_epoch_and_goes_on_from_every_position() -> None:
    counts_S = np.array([3, 0, 20, 1, 13])
    order = Order(1, counts_S)

    def places(start: Position) -> Iterator[tuple[int, int, int]]:
        for window in order.windows(start):
            for index in range(len(window.at_W)):
                place = window.place(index)
                if (place.epoch, window.first.record + index) >= start:
                    yield place.epoch, place.shard, place.row

    every = {(shard, row) for shard, count in enumerate(counts_S) for row in range(count)}
    stream = list(islice(places(START), 37 * 3))
    epochs = [stream[i : i + 37] for i in (0, 37, 74)]
    for epoch, taken in enumerate(epochs):
        assert {(shard, row) for _, shard, row in taken} == every and {place[0] for place in taken} == {epoch}
    assert len({tuple(place[1:] for place in taken) for taken in epochs}) == 3
    for at in range(74):
        assert list(islice(places(Position(*divmod(at, 37))), 37)) == stream[at : at + 37]


def test_a_resume_reads_only_the_shards_that_it_still_needs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = DumpReader(work / "dump", seed=1)
    stream = [after for _, after in islice(reader.records(), 60)]
    opened: list[str] = []
    monkeypatch.setattr(
        reader_module, "read_rows", lambda path, rows: opened.append(path.name) or read_rows(path, rows)
    )
    next(reader.records(stream[50]))
    assert 0 < len(set(opened)) <= 2  # of 5


def test_rows_are_read_as_a_whole_shard_has_them(work: Path) -> None:
    path = DumpReader(work / "dump", 0).shards[0]
    every = list(read_shard(path))
    for batch_records in (1, 5, 64):
        for rows in ([], [0], [11], [2, 3, 9], range(12)):
            found = list(read_rows(path, rows, batch_records))
            assert [record.doc_id for record in found] == [every[row].doc_id for row in rows]
            assert all((record.logprobs == every[row].logprobs).all() for record, row in zip(found, rows, strict=True))
    with pytest.raises(ValueError, match=r"part-00000\.parquet has 12 records, and none at row 12"):
        list(read_rows(path, [3, 12]))


class Changed:
    """A tokenizer with one token more."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.token_bytes, self.prefix, self.sha256 = tokenizer.token_bytes, tokenizer.prefix, "other"
        self._encode = tokenizer.encode_batch

    def encode_batch(self, documents: list[bytes]) -> list[Any]:
        return [[*ids, 5] if isinstance(ids, list) else ids for ids in self._encode(documents)]


def test_a_document_with_other_tokens_than_were_counted_stops_the_run_by_name(
    work: Path, tokenizer: ByteTokenizer
) -> None:
    counts = count_all(DumpReader(work / "dump", 0), Changed(tokenizer))
    with pytest.raises(ValueError, match=r"document d\d+: \d+ tokens were counted when the run began, now: \d+ tokens"):
        next(preparation(work, tokenizer, 0, 1).steps(counts))


def assert_equal(ours: Lengths, theirs: Lengths) -> None:
    assert (ours.counts_S == theirs.counts_S).all() and (ours.tokens_N == theirs.tokens_N).all()
    assert ours.reasons == theirs.reasons


def test_counts_are_kept_by_several_ranks_and_a_start_counts_only_what_is_missing_damaged_or_of_another_key(
    work: Path,
    tokenizer: ByteTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = DumpReader(work / "dump", 0)
    expected = count_all(reader, tokenizer)
    counted: list[int] = []

    def watched(reader: Any, shard: int, *others: Any) -> Iterator[int | str]:
        counted.append(shard)
        found = list(count_shard(reader, shard, *others))
        return iter(["cannot be spelled", *found[1:]] if shard == 2 else found)

    monkeypatch.setattr(lengths_module, "count_shard", watched)
    for rank in range(2):
        keep_counts(tmp_path, "key", reader, tokenizer, None, rank, 2)
    assert counted == [0, 2, 4, 1, 3]
    kept = kept_counts(tmp_path, 5)
    assert kept.reasons == {24: "cannot be spelled"} and kept.tokens_N[24] == 0
    assert (np.delete(kept.tokens_N, 24) == np.delete(expected.tokens_N, 24)).all()
    counted.clear()
    (tmp_path / "part-00001.parquet").unlink()
    content = bytearray((tmp_path / "part-00003.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "part-00003.parquet").write_bytes(content)
    keep_counts(tmp_path, "key", reader, tokenizer, None, 0, 1)
    assert counted == [1, 3] and "part-00003.parquet is damaged" in capsys.readouterr().err
    assert_equal(kept_counts(tmp_path, 5), kept)
    keep_counts(tmp_path, "another key", reader, tokenizer, None, 0, 1)
    assert counted == [1, 3, 0, 1, 2, 3, 4]


def test_what_cannot_be_used_is_left_out_by_reason_and_nothing_at_all_is_refused() -> None:
    counts = Lengths.of([[10, "not a chat", 300], [], [20, "not a chat", 30]])
    batches: list[BatchPlan] = list(islice(plan_batches(counts, 0, 40, 100), 6))
    used = [document.num_tokens for batch in batches for document in batch.documents]
    epochs = batches[-1].after.epoch
    assert set(used) == {10, 20, 30} and epochs >= 2
    left_out = sum((batch.left_out for batch in batches), Counter[str]())
    assert left_out["not a chat"] >= 2 * epochs and left_out[TOO_LONG] >= epochs
    assert all(batch.num_tokens >= 40 for batch in batches)
    with pytest.raises(ValueError, match=r"no record of the dump can be used: .*'not a chat': 2, .*max_tokens': 4"):
        next(plan_batches(counts, 0, 40, 5))
    with pytest.raises(ValueError, match="the dump's 2 shards hold no record"):
        next(plan_batches(Lengths.of([[], []]), 0, 40, 5))
