"""The table of documents that dumps have in common: made once, kept in the run's folder, mapped by all ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.record import Record
from stage2_student.data.contents import join_table
from stage2_student.data.contents.join_table import JoinTable, Keep
from stage2_student.data.contents.opened import OpenDump
from stage2_student.data.mix import Mix
from stage2_student.data.reader import DumpReader
from tests.stage2_student.data.contents.test_by_id import numbered, write

TEXTS = [b"text %d" % i for i in range(11)] + [b"twice", b"twice"]


@pytest.fixture
def dumps(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "one", numbered(TEXTS), "a", lacks=[2]),
        write(tmp_path / "two", numbered(TEXTS), "b", every=2, window=4, end=3),
    ]


def opened(dumps: list[Path], keep: Keep | None) -> DumpReader:
    return DumpReader(dumps[0], 0, dumps[1:], Mix.of([1.0] * len(dumps), "arithmetic"), keep)


def records(reader: DumpReader) -> list[Record]:
    numbers = [sum(1 for _ in reader.record_texts(shard)) for shard in range(reader.num_shards)]
    return [record for shard, number in enumerate(numbers) for record in reader.records_of(shard, range(number))]


def test_a_kept_table_gives_the_records_of_one_in_memory_and_is_made_once(
    dumps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = opened(dumps, None)
    made = opened(dumps, Keep(tmp_path / "run/joined", makes=True))

    def read_again(*_: Any) -> Any:
        raise AssertionError("the dumps were read again")

    monkeypatch.setattr(join_table, "contents_of", read_again)
    mapped = [opened(dumps, Keep(tmp_path / "run/joined", makes=makes)) for makes in (False, True)]
    for reader in (made, *mapped):
        assert reader.remarks == expected.remarks and len(reader.remarks) == 2
        for ours, theirs in zip(records(reader), records(expected), strict=True):
            assert ours.doc_id == theirs.doc_id and np.array_equal(ours.logprobs, theirs.logprobs)
    assert mapped[0].join is not None and isinstance(mapped[0].join._table.keys_N.base, np.memmap)


def test_a_table_of_other_dumps_is_made_anew(dumps: list[Path], tmp_path: Path) -> None:
    keep = Keep(tmp_path / "joined", makes=True)
    opened(dumps, keep)
    other = [dumps[1], write(tmp_path / "three", numbered(TEXTS), "c", lacks=[0, 1, 2])]
    assert opened(other, keep).remarks == opened(other, None).remarks != opened(dumps, None).remarks


def test_what_is_common_is_found_as_by_comparison_with_each(dumps: list[Path]) -> None:
    table = JoinTable.of([OpenDump(dump) for dump in dumps])
    for shard in range(5):
        keys = table.keys_N[table.shard_N == shard]
        assert np.array_equal(table.keys_of(shard), keys)
        assert table.are_common(keys).tolist() == [key in table.common_K.tolist() for key in keys.tolist()]
    assert not table.are_common(np.array([2**64 - 1, 0], dtype=np.uint64)).any()
