"""Keys of documents made without their text: equal where those made from it are, and no text is read for them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas import shard
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, Segment
from schemas.shard import commit_shard, to_table
from stage2_student.data.contents.by_id import contents_of, overlap_keys
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.contents.table import Contents
from stage2_student.data.mix import Mix
from stage2_student.data.reader import DumpReader
from tests.support.small_dumps import make_record

PER_SHARD = 4


def cut(name: str, text: bytes, every: int, window: int | None, end: int) -> list[Record]:
    """Make the windows of a document, whose teacher's tokens have `every` bytes each."""
    records = []
    for start in range(0, max(len(text), 1), window or max(len(text), 1)):
        part = text[start : start + (window or len(text))]
        record = make_record(name, part, np.random.default_rng(len(text)), [Segment(0, min(end, len(part)), False)])
        lengths = np.array([min(every, len(part) - at) for at in range(0, len(part), every)], dtype=np.int32)
        logprobs = np.zeros(len(lengths), dtype=np.float32)
        cells = {"teacher_token_lengths": lengths, "teacher_token_logprobs": logprobs}
        records.append(replace(record, window_start=start, **cells))
    return records


def write(
    folder: Path, corpus: Sequence[tuple[str, bytes]], teacher: str, lacks: Sequence[int] = (), **how: Any
) -> Path:
    """Write a dump of a corpus, as it is planned: documents that the teacher left out are in the plan alone."""
    how = {"every": 3, "window": None, "end": 99} | how
    (folder / "shards").mkdir(parents=True)
    plans = []
    identity = {"teacher": {"model": teacher, "tokenizer_sha256": str(how["every"])}, "corpus": {"field": "text"}}
    for first in range(0, len(corpus), PER_SHARD):
        own = corpus[first : first + PER_SHARD]
        plan = ShardPlan(len(plans), first, len(own), 0, hashlib.sha256(repr(own).encode()).hexdigest())
        kept = [document for at, document in enumerate(own, first) if at not in lacks]
        commit_shard(to_table([r for one in kept for r in cut(*one, **how)], identity), plan.path(folder), 3)
        plans.append(plan)
    Manifest(identity=identity, corpus_counts={}, shards=tuple(plans)).save(folder)
    return folder


def numbered(texts: Sequence[bytes]) -> list[tuple[str, bytes]]:
    return [(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def read_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...] | None]]:
    """Record the file and columns of everything that is read of a shard."""
    read: list[tuple[str, tuple[str, ...] | None]] = []
    before = shard.open_parquet

    class Watched:
        def __init__(self, path: Any, file: Any) -> None:
            self._path, self._file = path, file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def iter_batches(self, columns: Sequence[str] | None = None, **options: Any) -> Iterator[Any]:
            read.append((self._path.name, None if columns is None else tuple(columns)))
            return self._file.iter_batches(columns=columns, **options)  # type: ignore[no-any-return]

    class Opened:
        def __init__(self, path: Any, *options: Any) -> None:
            self._path, self._opened = path, before(path, *options)

        def __enter__(self) -> Watched:
            return Watched(self._path, self._opened.__enter__())

        def __exit__(self, *error: Any) -> Any:
            return self._opened.__exit__(*error)

    monkeypatch.setattr(shard, "open_parquet", Opened)
    return read


def classes(keys: Sequence[np.ndarray]) -> list[int]:
    """Name each key by where it is first, so that two tables are equal if the same keys are equal."""
    first: dict[int, int] = {}
    return [first.setdefault(key, len(first)) for of_dump in keys for key in of_dump.tolist()]


def test_dumps_of_one_plan_are_joined_without_their_text(tmp_path: Path, read_of: list[Any]) -> None:
    corpus = numbered([b"x" * (i + 1) for i in range(11)])
    dumps = [
        write(tmp_path / "one", corpus, "a", lacks=[2]),
        write(tmp_path / "two", corpus, "b", every=2, window=4, lacks=[7]),
        write(tmp_path / "longer", [*corpus[:8], *numbered([b"more"] * 9)[8:9]], "c", every=5),
    ]
    reader = DumpReader(dumps[0], 0, dumps[1:2], Mix.of([1.0, 1.0], "arithmetic"))
    assert len(read_of) == 6 and all(columns is not None and "document" not in columns for _, columns in read_of)
    assert all("conversation" not in columns and "symbols" not in columns for _, columns in read_of)
    assert {len(record.document) for record, _ in islice(reader.records(), 9)} == set(range(1, 12)) - {3, 8}
    read_of.clear()
    contents_of([OpenDump(dump) for dump in (dumps[0], dumps[2])])  # the plans differ in their third shard
    assert any(columns is not None and "document" in columns for _, columns in read_of)


def test_texts_of_joined_records_are_read_without_targets_and_are_those_of_the_records(
    tmp_path: Path, read_of: list[Any]
) -> None:
    corpus = numbered([b"some text %d" % i for i in range(11)])
    dumps = [write(tmp_path / "one", corpus, "a", window=5), write(tmp_path / "two", corpus, "b", every=2, end=9)]
    reader = DumpReader(dumps[0], 0, dumps[1:], Mix.of([1.0, 1.0], "arithmetic"))
    read_of.clear()
    texts = [list(reader.record_texts(shard)) for shard in range(reader.num_shards)]
    assert len(read_of) == 6 and all(columns is not None and "symbols" not in columns for _, columns in read_of)
    assert sum("document" in columns for _, columns in read_of) == 3  # of the first dump
    assert sum(map(len, texts)) > 11
    for shard_of, own in enumerate(texts):
        for text, record in zip(own, reader.records_of(shard_of, range(len(own))), strict=True):
            shared = (text.doc_id, text.window_start, text.document, text.segments)
            assert shared == (record.doc_id, record.window_start, record.document, record.segments)
            assert not len(text.teacher_token_lengths)


def test_keys_are_equal_where_those_of_the_text_are(tmp_path: Path) -> None:
    """Of texts and names that occur again, documents that a dump lacks, and a plan that goes on where another ends."""
    with_text = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        texts = [bytes(rng.integers(97, 99, int(rng.integers(1, 9))).tolist()) for _ in range(int(rng.integers(6, 14)))]
        corpus = numbered(texts)
        if seed % 4 == 0:
            corpus[3] = (corpus[1][0], corpus[3][1])
        dumps = []
        for index in range(2 + seed % 2):
            lacks = rng.choice(len(corpus), int(rng.integers(0, 4)), replace=False).tolist()
            own = corpus if index else corpus[: len(corpus) // PER_SHARD * PER_SHARD]
            how = {"every": index + 1, "window": [None, 3][int(rng.integers(2))], "end": int(rng.integers(1, 9))}
            dumps.append(OpenDump(write(tmp_path / f"{seed}-{index}", own, str(index), lacks, **how)))
        found, expected = contents_of(dumps), [Contents.of(dump) for dump in dumps]
        assert classes([of.keys_N for of in found]) == classes([of.keys_N for of in expected])
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("supervised_N", "shard_N", "row_N", "count_N"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name))
            with_text += np.isin(theirs.keys_N, ours.keys_N).sum()
    assert with_text  # some of them


@pytest.mark.parametrize("name", ["", "d"])
def test_a_name_that_two_documents_have_stands_for_neither_unless_names_are_row_numbers(
    tmp_path: Path, read_of: list[Any], name: str
) -> None:
    """Each dump lacks another document of a shard: those of one name may then be seen once in each."""
    corpus = [(f"{name}{i}", b"x" * (i + 1)) for i in range(8)]
    if name:
        corpus[2] = (corpus[1][0], b"yy")
    dumps = [OpenDump(write(tmp_path / str(lacks), corpus, "t", [lacks], every=lacks)) for lacks in (1, 2)]
    found, expected = contents_of(dumps), [Contents.of(dump) for dump in dumps]
    assert classes([of.keys_N for of in found]) == classes([of.keys_N for of in expected])
    read = [file for file, columns in read_of[:-4] if "document" in columns]
    assert read == ["part-00000.parquet"] * (2 if name else 0)


def test_text_is_read_only_of_shards_with_documents_that_may_be_equal(tmp_path: Path, read_of: list[Any]) -> None:
    texts = [b"x" * (i + 1) for i in range(12)]
    texts[5] = texts[6]
    dumps = [write(tmp_path / name, numbered(texts), name, every=i + 1) for i, name in enumerate("ab")]
    one, two = contents_of([OpenDump(dump) for dump in dumps])
    assert sorted(name for name, columns in read_of if "document" in columns) == ["part-00001.parquet"] * 2
    assert classes([one.keys_N, two.keys_N]) == [*range(6), 5, *range(6, 11)] * 2


@pytest.mark.parametrize("lacks", [(1, 2), (0, 1), (0, 3), (0, 5)])
def test_of_documents_that_one_dump_lacks_each_the_text_is_compared_if_they_are_as_long(
    tmp_path: Path, lacks: tuple[int, int]
) -> None:
    corpus = numbered([b"one", b"two", b"two", b"twin", b"four", b"six"])
    dumps = [OpenDump(write(tmp_path / str(i), corpus, "t", [lacked], every=i + 1)) for i, lacked in enumerate(lacks)]
    expected = [Contents.of(dump).keys_N for dump in dumps]
    assert classes([of.keys_N for of in contents_of(dumps)]) == classes(expected)


@pytest.mark.parametrize("identity", [{"corpus": {"supervise": "what was written"}}, {"teacher": {"model": "t"}}])
def test_texts_whose_tokens_may_differ_are_read(tmp_path: Path, read_of: list[Any], identity: dict[str, Any]) -> None:
    dumps = [write(tmp_path / name, numbered([b"a", b"bc"]), name) for name in "ab"]
    manifest = Manifest.load(dumps[0])
    manifest.model_copy(update={"identity": manifest.identity | identity}).save(dumps[0])
    contents_of([OpenDump(dump) for dump in dumps])
    assert [columns for _, columns in read_of if "document" in columns]


def test_corpora_of_one_teacher_are_compared_by_the_lengths_of_tokens_first(tmp_path: Path, read_of: list[Any]) -> None:
    one, two = [b"abc" * i for i in range(1, 9)], [b"d" * (3 * i + 1) for i in range(7)] + [b"abcabc"]
    dumps = [OpenDump(write(tmp_path / str(i), numbered(texts), "t")) for i, texts in enumerate((one, two))]
    keys = overlap_keys(dumps)
    assert np.isin(keys[0], keys[1]).tolist() == [False, True] + [False] * 6
    assert sorted(name for name, columns in read_of if "document" in columns) == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    other = OpenDump(write(tmp_path / "other", numbered(two), "another"))
    assert np.isin(*overlap_keys([dumps[0], other])).tolist() == [False, True] + [False] * 6
