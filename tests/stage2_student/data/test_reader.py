"""Records of a dump, read by number."""

from itertools import islice
from pathlib import Path

import pytest

from schemas.shard import read_rows, read_shard
from stage2_student.data import order as order_module
from stage2_student.data import reader as reader_module
from stage2_student.data.reader import DumpReader
from tests.support.small_dumps import make_work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows small, so that a dump of 60 records has several, which end inside shards."""
    monkeypatch.setattr(order_module, "WINDOW_PIECES", 8)


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
