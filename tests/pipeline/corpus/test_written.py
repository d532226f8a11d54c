"""Rows of a written corpus that say of a part that is not there that a model wrote it: left out, by name."""

from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
from schemas.manifest import ShardPlan
from schemas.text_corpus import TextManifest, commit_text_shard
from tests.support.fuzz import written_row

ELSEWHERE = "what it says that a model wrote is no part of it"
PLAN = ShardPlan(0, 0, 2, 10, "0" * 64)


def written(folder: Path, is_chat: bool, column: str, value: Any) -> Corpus:
    """Return a corpus of two rows; the second has another value in a column."""
    rows = [written_row(number, is_chat, Random(0)) for number in range(2)]
    path = PLAN.path(folder)
    path.parent.mkdir(parents=True)
    identity = {"prompts": {"field": "messages"} if is_chat else {}}
    TextManifest(identity=identity, prompt_counts={}, shards=(PLAN,)).save(folder)
    commit_text_shard(rows, path, identity, {})
    table = pq.read_table(path)
    if value is None:
        table = table.drop_columns([column])
    else:
        field = table.schema.field(column)
        values = pa.array([table[column][0].as_py(), value], field.type)
        table = table.set_column(table.schema.get_field_index(column), field, values)
    pq.write_table(table, path)
    return Corpus(CorpusConfig(source=str(folder), field="messages" if is_chat else "text"))


@pytest.mark.parametrize(
    ("is_chat", "column", "value"),
    [
        (False, "segment_starts", [13]),
        (False, "segment_starts", [-1]),
        (False, "segment_lengths", [-2]),
        (False, "segment_lengths", [5, 1]),
        (True, "supervised_messages", [2]),
        (True, "supervised_messages", [-1]),
        (True, "supervised_messages", [0]),
    ],
)
def test_a_row_whose_written_part_lies_elsewhere_is_left_out(
    tmp_path: Path, is_chat: bool, column: str, value: list[int]
) -> None:
    corpus = written(tmp_path, is_chat, column, value)
    assert [document.doc_id for document in corpus.documents()] == ["0/0"]
    assert [key for key in corpus.counts if ELSEWHERE in key]


def test_a_shard_that_lacks_a_column_is_named_by_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged: it has no num_tokens"):
        list(written(tmp_path, False, "num_tokens", None).documents())


def test_an_altered_page_of_a_written_corpus_is_not_read(tmp_path: Path) -> None:
    corpus = written(tmp_path, False, "segment_starts", [len("a pr\u00f3mpt ".encode())])
    assert len(list(corpus.documents())) == 2
    path = PLAN.path(tmp_path)
    commit_text_shard([written_row(0, False, Random(0))], tmp_path / "sealed.parquet", {}, {})
    content = bytearray((tmp_path / "sealed.parquet").read_bytes())
    content[40] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"part-00000.parquet cannot be read"):
        list(Corpus(corpus.config).documents())
