"""Counts of records' tokens: kept by several ranks, and read again."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.shard import commit_shard
from stage2_student.data.batch_plan import plan_batches
from stage2_student.data.encode import TurnsLeftOut
from stage2_student.data.lengths import mapped
from stage2_student.data.lengths.mapped import kept_counts, mapped_counts
from stage2_student.data.lengths.parts import read_parts
from stage2_student.data.reader import DumpReader
from stage2_student.data.token_counts import Counted, Lengths, count_records, keep_counts
from tests.support.micro_batches import count_all, pieces_of
from tests.support.small_dumps import make_work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> ByteTokenizer:
    return ByteTokenizer.load(str(work / "model"))


@pytest.mark.parametrize("seed", range(5))
def test_a_piece_is_found_by_its_number(seed: int) -> None:
    random = np.random.default_rng(seed)
    shards = [[Counted((5,) * int(n)) for n in random.choice([0, 1, 1, 2, 5], size)] for size in (7, 0, 12)]
    counts = Lengths.of(shards)
    assert counts.num_records == 19
    for shard, records in enumerate(shards):
        expected = [(row, piece) for row, record in enumerate(records) for piece in range(max(len(record.tokens), 1))]
        assert pieces_of(counts, shard, int(counts.counts_S[shard])) == expected


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


@pytest.mark.parametrize("with_bytes", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_arrays_in_files_are_those_made_record_by_record(tmp_path: Path, seed: int, with_bytes: bool) -> None:
    rng = np.random.default_rng(seed)

    def counted() -> Counted:
        continues, num_bytes = bool(rng.random() < 0.3), int(rng.integers(0, 99))
        if rng.random() < 0.1:
            return Counted((), ("cannot be spelled", "strips")[int(rng.integers(2))], num_bytes, continues)
        tokens = tuple(rng.integers(1, 50, rng.choice([1, 1, 2, 5])).tolist())
        turns = tuple(TurnsLeftOut(reason, 1, 9) for reason in ("a", "b") if rng.random() < 0.2)
        renderings = min(len(tokens), int(rng.integers(1, 3)))
        of_pieces = tuple(rng.integers(0, 60, len(tokens)).tolist()) if with_bytes else ()
        return Counted(tokens, None, num_bytes, continues, renderings, turns, of_pieces)

    shards = [[counted() for _ in range(number)] for number in (40, 0, 1, 90)]
    expected = Lengths.of(shards)
    keep_counts(tmp_path, "key", range(4), lambda shard: iter(shards[shard]))
    made = mapped_counts(tmp_path, 4, "key")
    shared = mapped_counts(tmp_path, 4, "key", makes=False)
    for found in (kept_counts(tmp_path, 4), made, shared):
        assert_equal(found, expected)
        assert found.num_rendered == expected.num_rendered and found.num_records == expected.num_records
        assert (
            found.unusable().keys() == expected.unusable().keys()
            and found.num_unused_bytes == expected.num_unused_bytes
        )
        for shard, number in enumerate(expected.counts_S.tolist()):
            assert pieces_of(found, shard, number) == pieces_of(expected, shard, number)
        for max_tokens in (10, 100):
            assert found.sums(max_tokens) == expected.sums(max_tokens)
            assert found.sums(max_tokens).tokens == expected.tokens_U[expected.usable(max_tokens)].sum()
        assert np.array_equal(found.bytes_U, expected.bytes_U) or not (expected.bytes_U.any() or len(found.bytes_U))
        plans = [plan_batches(of, 0, 300, 45) for of in (found, expected)]
        for ours, theirs in islice(zip(*plans, strict=True), 20):
            assert tuple(ours.documents) == tuple(theirs.documents) and ours.left_out == theirs.left_out
    assert shared.reasons.get(10**9) is None and isinstance(shared.tokens_U.base, np.memmap)


def test_arrays_are_made_once_for_a_key_and_whole_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_counts(tmp_path, "key", range(2), lambda shard: iter([Counted((5 + shard,))]))
    read: list[int] = []
    monkeypatch.setattr(mapped, "read_parts", lambda *args: read.append(1) or read_parts(*args))
    assert mapped_counts(tmp_path, 2, "key").tokens_U.tolist() == [5, 6]
    assert mapped_counts(tmp_path, 2, "key").tokens_U.tolist() == [5, 6] and read == [1]
    keep_counts(tmp_path, "other", range(2), lambda shard: iter([Counted((7 + shard,))]))
    assert mapped_counts(tmp_path, 2, "other").tokens_U.tolist() == [7, 8]
    (tmp_path / "arrays.d" / "about.json").rename(tmp_path / "about.json")  # a folder without it is not one

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mapped, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            mapped_counts(tmp_path, 2, "other")
    assert mapped_counts(tmp_path, 2, "other").tokens_U.tolist() == [7, 8]


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
        found = list(count_records(reader.record_texts(shard), tokenizer))
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
