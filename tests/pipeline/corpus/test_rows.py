"""The rows of a corpus' files: of Parquet, JSON lines and plain text."""

import gzip
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.documents import Corpus
from pipeline.corpus.rows import RowSource
from tests.support.corpus_files import corpus, lines, texts


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read"):
        texts(corpus(tmp_path / "c.parquet"))


def test_empty_parquet_files_and_partitions_end_nothing(tmp_path):
    schema = pa.schema([("text", pa.string())])
    for name, rows in (("a", ["x"]), ("b", []), ("deep/p=1/c", []), ("deep/p=2/d", ["y", "z"]), ("e", [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": rows}, schema=schema), tmp_path / f"{name}.parquet")
    assert texts(corpus(tmp_path)) == [b"x", b"y", b"z"]
    assert [document.doc_id for document in corpus(tmp_path).documents()] == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"yields no usable document.*it is empty"):
        texts(corpus(tmp_path / "b.parquet"))


def test_a_parquet_column_that_python_has_no_values_for_does_not_cost_the_text_beside_it(tmp_path):
    table = pa.table(
        {
            "text": ["x", "y"],
            "far": pa.array([2**62, 1], pa.timestamp("us")),
            "long": pa.array([2**62, 1], pa.duration("s")),
            "zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Base")),
            "id": ["a", "b"],
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    assert texts(corpus(tmp_path / "c.parquet")) == [b"x", b"y"]
    assert [document.doc_id for document in corpus(tmp_path / "c.parquet", id_field="id").documents()] == ["a", "b"]
    with pytest.raises(ValueError, match="no field 'far'"):
        texts(corpus(tmp_path / "c.parquet", field="far"))


def test_parquet_rows_are_those_that_the_datasets_library_gives(tmp_path):
    """Documents do not depend on which rows were read before; row groups and batches of any size change nothing."""
    from datasets import load_dataset

    rng = random.Random(0)
    chats = [[{"role": "user", "content": "q" * i}, {"role": "assistant", "content": None}] for i in range(3)]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table(
        {
            "text": pa.array([rng.choice(["a", "é", None, ""]) for _ in range(900)]),
            "category": pa.array([rng.choice("xyz") for _ in range(900)]).dictionary_encode(),
            "n": pa.array(range(900), pa.int32()),
            "chat": pa.array([chats[i % 3] for i in range(900)], kind),
            "more": pa.array([{"deep": {"x": i}} for i in range(900)]),
        }
    )
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    found = [row.columns for _, row in RowSource.resolve(str(tmp_path / "c.parquet"), "train", 10**6).rows()]
    assert found == list(load_dataset("parquet", data_files=str(tmp_path / "c.parquet"), split="train"))


def test_a_parquet_row_whose_text_is_not_utf8_costs_that_row_alone(tmp_path):
    values = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "c.parquet")
    found = corpus(tmp_path / "c.parquet")
    assert texts(found) == [b"a", b"b"] and found.counts["left out: not valid UTF-8"] == 1


def test_a_byte_order_mark_is_no_text_whatever_holds_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfsix"))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf")
    found = corpus(tmp_path, max_row_bytes=20)
    assert texts(found) == [b"one", b"two", b"six"] and found.counts["left out: empty text"] == 1
    assert texts(corpus(tmp_path / "a.txt", max_row_bytes=3)) == [b"one"]


def test_under_the_first_arithmetic_files_read_as_they_did(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.json").write_text('[\n{"text": "x"},\n{"text": "y"}\n]\n')
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    found = Corpus(CorpusConfig(source=str(tmp_path)), arithmetic=1)
    assert texts(found) == [b"\xef\xbb\xbfone", b"y"]


def test_a_row_that_is_too_long_is_counted_and_not_held(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y" * 30_000_000}, {"text": "z"})
    (tmp_path / "b.txt").write_bytes(b"t" * 60)
    pq.write_table(pa.table({"text": ["u" * 60, "v"]}), tmp_path / "c.parquet")
    found = corpus(tmp_path, max_row_bytes=50)
    assert texts(found) == [b"x", b"z", b"v"]
    assert found.counts["left out: longer than corpus.max_row_bytes"] == 3
    tracemalloc.start()
    assert texts(corpus(path, max_row_bytes=50)) == [b"x", b"z"]
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert len(texts(corpus(path))) == 2  # the default leaves out rows that no tokenizer should have to hold


def test_a_text_file_is_one_document_with_its_line_ends_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    found = corpus(tmp_path)
    assert texts(found) == [b"one\r\ntwo\n"]
    assert found.counts["left out: not valid UTF-8"] == 1


def test_parquet_yields_its_rows(tmp_path):
    pq.write_table(pa.table({"text": ["x", None, "y"], "name": ["p", "q", "r"]}), tmp_path / "c.parquet")
    found = list(corpus(tmp_path / "c.parquet", id_field="name").documents())
    assert [(document.doc_id, document.text) for document in found] == [("p", b"x"), ("r", b"y")]
