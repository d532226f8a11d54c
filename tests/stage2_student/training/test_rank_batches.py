"""Batches of each rank: planned by lengths alone, the same over all ranks in any world."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from schemas.shard import commit_shard, read_rows, read_shard
from stage2_student.data import order as order_module
from stage2_student.data import reader as reader_module
from stage2_student.data.batch_plan import BatchPlan, plan_batches
from stage2_student.data.encode import TOO_LONG, TurnsLeftOut
from stage2_student.data.order import START, Order, Position
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Counted, Lengths, count_shard, keep_counts, kept_counts
from stage2_student.runs.identity import counts_key, run_identity
from stage2_student.training.rank_batches import BatchBuilder, Sources
from stage2_student.training.usable import counted_lines, remarks, usable_lines
from tests.support.micro_batches import count_all, global_batches
from tests.support.small_dumps import make_dump, make_recipe
from tests.support.tiny import tiny_model

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
    sources = Sources(DumpReader(work / "dump", 0), tokenizer, None, SpecialIds(268, (268,)))
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
    for plan, micro_batches in builder(work, tokenizer, 1, 3).steps(counts):
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


def test_a_resume_reads_only_the_shards_that_it_still_needs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LANES", 2)
    monkeypatch.setattr(order_module, "STRIPES", 1)
    reader = DumpReader(work / "dump", seed=1)
    stream = [after for _, after in islice(reader.records(), 60)]
    opened: list[str] = []
    monkeypatch.setattr(
        reader_module, "read_rows", lambda path, rows, **options: opened.append(path.name) or read_rows(path, rows)
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
    with pytest.raises(ValueError, match=r"part-00000\.parquet has no row 12, only 12"):
        list(read_rows(path, [3, 12]))


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
        for plan, micro_batches in builder(work, tokenizer, rank, 2, max_tokens=20).steps(counts):
            if plan.after.epoch:
                break
            trained.append(sum(micro.num_bytes for micro in micro_batches))
            assert max(micro.tokens_BL.shape[1] for micro in micro_batches) <= 20
    assert len(read) < 60 * 2 + 60  # a record is read by a rank once in a window, not once for each of its pieces
    plans = list(takewhile(lambda plan: not plan.after.epoch, plan_batches(counts, 0, 120, 20)))
    of_rank = builder(work, tokenizer, 1, 2, max_tokens=20)
    straight = [micro_batches for _, micro_batches in islice(of_rank.steps(counts), 5)]
    for at, plan in enumerate(plans[:4], 1):  # resumed in the middle of documents
        resumed = next(of_rank.steps(counts, plan.after))[1]
        for ours, theirs in zip(resumed, straight[at], strict=True):
            assert ours.doc_ids == theirs.doc_ids and torch.equal(ours.tokens_BL, theirs.tokens_BL)
    taken = [planned.ref[4:] for plan in plans for planned in plan.documents]
    pieces = {
        (shard, *place) for shard, count in enumerate(counts.counts_S) for place in rows(counts, shard, int(count))
    }
    assert len(set(taken)) == len(taken) and set(taken) <= pieces and len(taken) > len(pieces) - 20
    # All bytes of the documents, but those of the last step, which reaches into the next epoch.
    left = len(pieces) - len(taken)
    assert counts.num_bytes - left * 120 <= sum(trained) <= counts.num_bytes


def rows(counts: Lengths, shard: int, count: int) -> list[tuple[int, int]]:
    found = counts.rows(np.full(count, shard), np.arange(count))
    return list(zip(*(column.tolist() for column in found), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_piece_is_found_by_its_number(seed: int) -> None:
    random = np.random.default_rng(seed)
    shards = [[Counted((5,) * int(n)) for n in random.choice([0, 1, 1, 2, 5], size)] for size in (7, 0, 12)]
    counts = Lengths.of(shards)
    assert counts.num_records == 19
    for shard, records in enumerate(shards):
        expected = [(row, piece) for row, record in enumerate(records) for piece in range(max(len(record.tokens), 1))]
        assert rows(counts, shard, int(counts.counts_S[shard])) == expected


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
    for plan, micro_batches in ours.steps(counts):
        names = [name for micro in micro_batches for name in micro.doc_ids]
        assert sorted(names) == sorted((expected * 2)[len(trained) : len(trained) + len(names)]) or plan.after.epoch
        trained += names
        left_out += plan.left_out
        if plan.after.epoch:
            break
    assert len(trained) >= len(expected) and left_out[TOO_LONG] >= 60 - len(short)


def test_what_is_cut_and_left_out_is_said_with_its_share_of_the_bytes(work: Path, tokenizer: ByteTokenizer) -> None:
    train = builder(work, tokenizer, 0, 1, max_tokens=20).recipe.train
    shard = [Counted((19, 15), num_bytes=60), Counted((7,), num_bytes=20), Counted((), "cannot be spelled", 20)]
    lines = list(remarks(Lengths.of([shard]), train, order_module.VERSION))
    assert lines[0] == "an epoch: 2 records, 41 tokens, 0.3 steps; 1 record cannot be used"
    assert lines[1].startswith("1 record of more than 20 tokens (train.max_tokens) is cut into 2 pieces")
    assert lines[2:] == ["left out: 1 record, 20.0 % of the supervised bytes: cannot be spelled"]
    whole = [Counted((30,), num_bytes=60), Counted((10,), num_bytes=20)]
    lines = list(remarks(Lengths.of([whole]), train, order_module.WHOLE_RECORDS))
    assert "left out: 1 record, 75.0 % of the tokens: longer than train.max_tokens" in lines
    assert "continues in the order that it began in" in lines[-1]


def test_a_plan_tells_what_can_be_used_of_a_sample_and_of_what_a_run_has_counted(
    work: Path, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    reader = DumpReader(work / "dump", 0)
    recipe = make_recipe(work / "dump", work / "model", tmp_path, {"max_tokens": 20})
    records = [record for shard in range(5) for record in reader.record_texts(shard)]
    [(_, told)] = usable_lines(recipe, records)
    assert told.startswith("of 60 sampled, ") and told.endswith("100.0 % of the supervised bytes can be used")
    identity = run_identity(recipe, reader.manifest, tokenizer.sha256, SpecialIds(268, (268,)))
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    assert not list(counted_lines(recipe))
    keep_counts(
        tmp_path / "lengths",
        counts_key(identity),
        range(5),
        lambda shard: count_shard(reader, shard, tokenizer, None, 20),
    )
    lines = [text for _, text in counted_lines(recipe)]
    assert lines == list(remarks(count_all(reader, tokenizer, 20), recipe.train, order_module.VERSION))
    (tmp_path / "identity.json").write_text(json.dumps(identity | {"data_order": order_module.WHOLE_RECORDS}))
    assert not list(counted_lines(recipe))  # that were counts of pieces


def test_turns_that_are_left_out_are_said_beside_records_and_are_no_part_of_what_can_be_used(
    work: Path, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    train = builder(work, tokenizer, 0, 1, max_tokens=20).recipe.train
    reasons = (TurnsLeftOut("strips", 2, 30), TurnsLeftOut("calls", 1, 5))
    shard = [Counted((19, 15), None, 60, False, 2, reasons), Counted((18, 9), None, 20), Counted((), "strips", 20)]
    lengths = Lengths.of([shard, [Counted((19,), None, 100, False, 1, reasons[:1])]])
    lines = list(remarks(lengths, train, order_module.VERSION, has_chats=True))
    assert lines[1].startswith("1 chat is read 2 times, each time with other turns supervised")
    assert lines[2].startswith("1 record of more than 20 tokens (train.max_tokens) is cut into 2 pieces")
    assert lines[3:] == [
        "left out: 1 record, 10.0 % of the supervised bytes: strips",
        "left out: 4 turns of chats used without them, 30.0 % of the supervised bytes: strips",
        "left out: 1 turn of chats used without them, 2.5 % of the supervised bytes: calls",
    ]
    assert lengths.num_unused_bytes == 20 + 60 + 5
    assert "a chat is left out if" in list(remarks(lengths, train, order_module.WHOLE_CHATS, True))[-1]
    assert "a chat is left out if" not in list(remarks(lengths, train, order_module.WHOLE_CHATS))[-1]


def test_counts_of_a_release_that_used_chats_whole_are_read(
    work: Path, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    names = ("num_tokens", "left_out", "num_bytes", "continues")
    rows = [([19, 15], None, 60, False), ([], "strips", 20, False)]
    kinds = (pa.list_(pa.int32()), pa.string(), pa.int64(), pa.bool_())
    schema = pa.schema(list(zip(names, kinds, strict=True)), metadata={b"bld.counted_of": b"key"})
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema)
    commit_shard(table, tmp_path / "part-00000.parquet", zstd_level=3)
    found, expected = kept_counts(tmp_path, 1), Lengths.of([[Counted(tuple(row[0]), *row[1:]) for row in rows]])  # type: ignore[arg-type]
    assert_equal(found, expected)
    assert (found.num_cut, found.num_rendered, found.turns_left_out) == (1, 0, {})


def test_a_document_with_other_tokens_than_were_counted_stops_the_run_by_name(
    work: Path, tokenizer: ByteTokenizer
) -> None:
    counts = count_all(DumpReader(work / "dump", 0), Changed(tokenizer))
    with pytest.raises(ValueError, match=r"document d\d+: \d+ tokens were counted when the run began, now: \d+ tokens"):
        next(builder(work, tokenizer, 0, 1).steps(counts))


def assert_equal(ours: Lengths, theirs: Lengths) -> None:
    for name in ("counts_S", "tokens_U", "continues_U", "first_C", "pieces_C"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    for name in (
        "reasons",
        "num_bytes",
        "bytes_left_out",
        "num_cut",
        "num_cut_pieces",
        "num_renderings",
        "turns_left_out",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_counts_are_kept_by_several_ranks_and_a_start_counts_only_what_is_missing_damaged_or_of_another_key(
    work: Path,
    tokenizer: ByteTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader = DumpReader(work / "dump", 0)
    expected = count_all(reader, tokenizer)
    counted: list[int] = []

    def watched(shard: int) -> Iterator[Counted]:
        counted.append(shard)
        found = list(count_shard(reader, shard, tokenizer))
        return iter([Counted((), "cannot be spelled", 7), *found[1:]] if shard == 2 else found)

    for rank in range(2):
        keep_counts(tmp_path, "key", range(rank, 5, 2), watched)
    assert counted == [0, 2, 4, 1, 3]
    kept = kept_counts(tmp_path, 5)
    assert kept.reasons == {24: "cannot be spelled"} and kept.tokens_U[24] == 0
    assert kept.unusable() == {"cannot be spelled": (1, 7)}
    assert (np.delete(kept.tokens_U, 24) == np.delete(expected.tokens_U, 24)).all()
    counted.clear()
    (tmp_path / "part-00001.parquet").unlink()
    content = bytearray((tmp_path / "part-00003.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "part-00003.parquet").write_bytes(content)
    keep_counts(tmp_path, "key", range(5), watched)
    assert counted == [1, 3] and "part-00003.parquet is damaged" in capsys.readouterr().err
    assert_equal(kept_counts(tmp_path, 5), kept)
    keep_counts(tmp_path, "another key", range(5), watched)
    assert counted == [1, 3, 0, 1, 2, 3, 4]


def test_what_cannot_be_used_is_left_out_by_reason_and_nothing_at_all_is_refused() -> None:
    chat = Counted((), "not a chat")
    counts = Lengths.of(
        [[Counted((10,)), chat, Counted((300,))], [], [Counted((20,)), chat, Counted((30,))]],
    )
    batches: list[BatchPlan] = list(islice(plan_batches(counts, 0, 40, 100), 6))
    used = [document.num_tokens for batch in batches for document in batch.documents]
    epochs = batches[-1].after.epoch
    assert set(used) == {10, 20, 30} and epochs >= 2
    left_out = sum((batch.left_out for batch in batches), Counter[str]())
    assert left_out["not a chat"] >= 2 * epochs and left_out[TOO_LONG] >= epochs
    assert all(batch.num_tokens >= 40 for batch in batches)
    with pytest.raises(ValueError, match=r"no record of the dump can be used: .*'not a chat': 2, .*max_tokens': 4"):
        next(plan_batches(counts, 0, 40, 5))
    with pytest.raises(ValueError, match="none of the dump's 2 shards holds a record"):
        next(plan_batches(Lengths.of([[], []]), 0, 40, 5))
