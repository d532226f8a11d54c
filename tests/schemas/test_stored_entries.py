"""Version 3 stores the document's symbol apart and derives `token_end`.

All versions give the same targets to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import levels, shard
from schemas.record import Record, Segment
from schemas.record_checks import record_faults
from schemas.shard import commit_shard, read_rows, read_shard, read_with_faults, to_table, window_names
from schemas.stored_entries import disordered, joined_entries
from tests.schemas.make_golden import golden_records
from tests.support.readable_dumps import varied_record, with_tokens

TOKENS = {"tokens": {"top_k": 4}}
EXACT = {"coding": levels.EXACT}


def in_order(record: Record) -> Record:
    """Sort the entries of each position as version 3 has them: the document's symbol, then the others ascending."""
    entries, start = [], 0
    for realised, count in zip(record.realised().tolist(), record.entry_counts.tolist(), strict=True):
        entries += sorted(
            range(start, start + count), key=lambda at: (record.symbols[at] != realised, record.symbols[at])
        )
        start += count
    order = np.array(entries, dtype=np.int64)
    return replace(record, symbols=record.symbols[order], logprobs=record.logprobs[order])


def slow_token_end(record: Record) -> list[float]:
    """Return the largest `dropped` since each position's token began, position by position."""
    boundaries, at = {0, len(record.document)}, 0
    for length in record.teacher_token_lengths.tolist():
        at += length
        boundaries.add(at)
    found, position = [], 0
    for segment in record.segments:
        largest = 0.0
        for offset in range(segment.start, segment.start + segment.num_positions):
            largest = 0.0 if offset in boundaries else max(largest, float(record.dropped[position]))
            found.append(largest)
            position += 1
    return found


def drawn(seed: int, exact: bool = False) -> Record:
    """Draw a record of several segments, whose tokens do not end where those do."""
    rng = np.random.default_rng(seed)
    document = "".join(rng.choice(list("abé ✓"), 40)).encode()
    lengths = rng.multinomial(len(document), np.ones(20) / 20).astype(np.int32)  # some of no bytes
    cuts = np.sort(rng.choice(len(document) + 1, 4, replace=False)).tolist()
    segments = (
        Segment(cuts[0], cuts[1] - cuts[0], bool(rng.integers(2))),
        Segment(cuts[1], 0, True),
        Segment(cuts[2], cuts[3] - cuts[2], bool(rng.integers(2))),
    )
    parts = [document[s.start : s.start + s.length] + b"\xff" * s.has_end for s in segments]
    counts, symbols, logprobs = [], [], []
    for realised in b"".join(parts):
        num = 256 if exact else int(rng.integers(1, 6))
        others = rng.permutation(np.delete(np.arange(256), realised))[: num - 1].tolist()
        values = np.log(rng.dirichlet(np.ones(num + 1))[:num]) if exact else rng.choice([-2.5, -2.5, -3.25, -80.0], num)
        values = np.array([-0.0]) if num == 1 else values
        counts.append(num)
        symbols += rng.permutation([realised, *others]).tolist()
        logprobs += values.tolist()
    num_positions = len(counts)
    shares = (
        rng.random((2, num_positions)).astype(np.float32)
        if exact
        else rng.choice(levels.STORED_SHARES, (2, num_positions))
    )
    record = Record(
        doc_id=str(seed),
        window_start=0,
        document=document,
        segments=segments,
        teacher_token_lengths=lengths,
        teacher_token_logprobs=np.zeros(len(lengths), np.float32),
        entry_counts=np.array(counts, np.uint16),
        dropped=shares[0],
        token_end=shares[0],
        doubt=shares[1],
        symbols=np.array(symbols, np.uint8),
        logprobs=np.array(logprobs, np.float32),
    )
    follows = np.array(slow_token_end(record), np.float32)
    return replace(record, token_end=follows if seed % 2 else np.minimum(follows + shares[1], 1))


def assert_equal(ours: Record, theirs: Record) -> None:
    """Compare two records to the bit; the entries of a position are in any order."""
    ours, theirs = in_order(ours), in_order(theirs)
    for name, expected in vars(theirs).items():
        found = getattr(ours, name)
        if name == "tokens" and expected is not None:
            for part, values in vars(expected).items():
                assert getattr(found, part).tobytes() == values.tobytes(), part
        elif isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), name
        else:
            assert found == expected, name


def written(records: Sequence[Record], folder: Path, version: int = 3, identity: dict[str, Any] | None = None) -> Path:
    commit_shard(to_table(records, identity or {}, version), folder / f"{version}.parquet", zstd_level=3)
    return folder / f"{version}.parquet"


def all_kinds() -> list[Record]:
    without_segments = replace(
        varied_record("context", 3),
        segments=(),
        **{name: np.empty(0, np.float32) for name in ("dropped", "token_end", "doubt", "logprobs")},
        entry_counts=np.empty(0, np.uint16),
        symbols=np.empty(0, np.uint8),
    )
    end_alone = varied_record("end", 5, document=b"")
    return [without_segments, *map(drawn, range(12)), end_alone, varied_record("0", 7), end_alone, without_segments]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_shards_of_nothing_but_documents_without_bytes_are_read(number: int, tmp_path: Path) -> None:
    records = [varied_record(str(i), i, document=b"") for i in range(number)]
    path = written(records, tmp_path)
    found = list(read_shard(path))
    assert len(found) == number == pq.read_metadata(path).num_rows
    for ours, theirs in zip(found, records, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("version", "kind"), [(1, "rounded"), (1, "exact"), (2, "tokens"), (3, "rounded"), (3, "exact"), (3, "tokens")]
)
def test_every_version_gives_the_same_targets_to_the_bit(version: int, kind: str, tmp_path: Path) -> None:
    identity = {"rounded": {}, "exact": EXACT, "tokens": TOKENS}[kind]
    records = [drawn(seed, exact=True) for seed in range(4)] if kind == "exact" else all_kinds()
    if kind == "tokens":
        records = [with_tokens(record) for record in (*records[1:-1], *golden_records())]
    path = written(records, tmp_path, version, identity)
    for batch_records in (1, 3, 64):
        found = list(read_shard(path, batch_records))
        assert len(found) == len(records)
        for ours, theirs in zip(found, records, strict=True):
            assert_equal(ours, theirs)
            as_stored = in_order(theirs) if version == 3 else theirs
            assert ours.symbols.tobytes() == as_stored.symbols.tobytes()
    for row, record in zip([1, 3], read_rows(path, [1, 3], batch_records=2), strict=True):
        assert_equal(record, records[row])


def test_token_end_is_stored_for_the_records_alone_where_it_does_not_follow(tmp_path: Path) -> None:
    records = [drawn(seed) for seed in range(6)]
    stored = pq.read_table(written(records, tmp_path))["token_end"].to_pylist()
    assert [bool(values) for values in stored] == [True, False] * 3
    for record, values in zip(records, stored, strict=True):
        assert values == ([] if not values else record.token_end.tolist())
    shard_of_one = written([replace(records[1], token_end=np.zeros_like(records[1].token_end))], tmp_path)
    assert not next(read_shard(shard_of_one)).token_end.any()


def test_others_ascend_without_the_documents_symbol_and_the_text_is_a_string(tmp_path: Path) -> None:
    [record] = records = [varied_record("0", 7)]
    table = pq.read_table(written(records, tmp_path))
    assert table["document"].to_pylist() == [record.document.decode()]
    counts, symbols = table["other_counts"][0].as_py(), table["other_symbols"][0].as_py()
    at = 0
    for realised, count in zip(record.realised().tolist(), counts, strict=True):
        of_position = symbols[at : at + count]
        assert of_position == sorted(of_position) and realised not in of_position
        at += count
    assert at == len(symbols) == len(record.symbols) - record.num_positions


@pytest.mark.parametrize("seed", range(4))
def test_entries_are_joined_and_disorder_is_found_as_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, 50).astype(np.uint16) * np.uint16(seed != 3)  # none at all
    realised = rng.integers(0, 8, 50).astype(np.uint8)
    own, others = rng.random(50, np.float32), rng.random(int(counts.sum()), np.float32)
    symbols = rng.integers(0, 8, len(others)).astype(np.uint8)  # as often in disorder as not
    found = joined_entries(realised, own, counts, symbols, others)
    at, expected, wrong = 0, [], []
    for position, count in enumerate(counts.tolist()):
        of_position = symbols[at : at + count].tolist()
        expected += [(realised[position], own[position]), *zip(of_position, others[at : at + count], strict=True)]
        if of_position != sorted(set(of_position)) or realised[position] in of_position:
            wrong.append(position)
        at += count
    assert found[0].tolist() == [symbol for symbol, _ in expected]
    assert found[1].tolist() == [logprob for _, logprob in expected]
    assert disordered(realised, counts, symbols).tolist() == wrong
    assert bool(wrong) == (seed != 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: {"symbols": np.full_like(record.symbols, 7)}, "has a symbol twice, or lacks the document's"),
        (lambda record: {"document": b"another" + record.document[7:]}, "lacks the document's"),
        (lambda record: {"logprobs": record.logprobs * np.float32("nan")}, "not finite"),
        (lambda record: {"doubt": record.doubt[1:]}, "position columns differ"),
    ],
)
def test_a_record_that_the_version_cannot_hold_is_refused_by_name(change: Any, said: str) -> None:
    good, bad = varied_record("good", 1), varied_record("bad", 2)
    with pytest.raises(ValueError, match=rf"record 'bad' \(byte 0\) cannot be stored: .*{said}"):
        to_table([good, replace(bad, **change(bad))], {})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("other_counts", lambda values: [7, *values[1:]], "entry columns differ in length"),
        ("other_counts", lambda values: values[1:], "position columns differ"),
        ("other_symbols", lambda values: values[1:], "entry columns differ in length"),
        ("other_logprobs", lambda values: values[1:], "entry columns differ in length"),
        ("realised_logprobs", lambda values: values[1:], "entry columns differ in length"),
        ("realised_logprobs", lambda values: [], "entry columns differ in length"),
        ("realised_logprobs", lambda values: [0.5, *values[1:]], "is positive"),
        ("other_logprobs", lambda values: [math.nan, *values[1:]], "is positive or not finite"),
        ("other_symbols", lambda values: values[::-1], "do not ascend"),
        ("other_symbols", lambda values: [values[0]] * len(values), "do not ascend"),
        ("other_symbols", lambda values: [ord("a"), *values[1:]], "or have the document's"),
        ("teacher_token_logprobs", lambda values: values[1:], "token columns differ in length"),
        ("window_start", lambda start: -1, "starts before the document"),
        ("doubt", lambda values: values[1:], "position columns differ"),
        ("token_end", lambda values: [0.0], "position columns differ"),
        ("dropped", lambda values: values[1:], "position columns differ"),
        ("segment_lengths", lambda values: [2**31 - 1], "a segment lies outside the document"),
        ("segment_starts", lambda values: [-1], "a segment lies outside the document"),
        ("teacher_token_lengths", lambda values: values[1:], "teacher tokens do not span the document"),
    ],
)
def test_what_is_wrong_with_columns_is_a_fault_of_their_record(
    name: str, change: Any, said: str, tmp_path: Path
) -> None:
    table = to_table([varied_record("good", 1), varied_record("bad", 2), varied_record("better", 3)], {})
    field, lists = table.schema.field(name), table[name].to_pylist()
    changed = pa.array([lists[0], change(lists[1]), lists[2]], field.type)
    path = tmp_path / "shard.parquet"
    commit_shard(table.set_column(table.schema.get_field_index(name), field, changed), path, 1)
    for batch_records in (1, 64):
        (good, no_faults), (_, faults), (better, neither) = read_with_faults(path, batch_records)
        assert not record_faults(good) and not record_faults(better) and not no_faults and not neither
        assert any(said in fault for fault in faults)
    with pytest.raises(ValueError, match=rf"record 1 \(doc_id 'bad'\): .*{said}"):
        list(read_shard(path))
    with pytest.raises(ValueError, match=rf"record 1 \(doc_id 'bad'\): .*{said}"):
        list(read_rows(path, [1]))


def test_text_that_is_not_utf8_is_a_fault_of_its_record(tmp_path: Path) -> None:
    table = to_table([varied_record("good", 1, b"text"), varied_record("bad", 2, b"text")], {})
    texts = pa.array([b"text", b"t\xffxt"], pa.binary()).view(pa.string())
    index = table.schema.get_field_index("document")
    commit_shard(table.set_column(index, table.schema.field(index), texts), tmp_path / "shard.parquet", 1)
    (_, no_faults), (_, faults) = read_with_faults(tmp_path / "shard.parquet")
    assert not no_faults and faults[0] == "its text, or that of a message, is not UTF-8"


def test_row_groups_hold_so_much_text_and_only_those_of_the_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [varied_record(str(i), i, b"x" * (5 + i % 7)) for i in range(40)]
    monkeypatch.setattr(shard, "GROUP_BYTES", 64)
    path = written(records, tmp_path)
    footer = pq.read_metadata(path)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    at = 0
    for size in sizes[:-1]:
        num_bytes = [len(record.document) for record in records[at : at + size]]
        assert sum(num_bytes) >= 64 > sum(num_bytes[:-1])
        at += size
    assert len(sizes) > 3
    asked: list[list[int]] = []
    real = pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, *args: Any, **named: Any) -> Any:
        asked.append(named["row_groups"])
        return real(self, *args, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    rows = [0, sum(sizes[:2]), sum(sizes[:3]) - 1, 39]
    for row, record in zip(rows, read_rows(path, rows), strict=True):
        assert_equal(record, records[row])
    assert asked == [[0], [2], [len(sizes) - 1]]
    with pytest.raises(ValueError, match="has no row 40, only 40"):
        list(read_rows(path, [40]))
    assert [name for name, _ in window_names(path)] == [str(i) for i in range(40)]
