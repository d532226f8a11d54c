"""The corpus: every row is a document or is counted under a reason, and the n-th document is always the same."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.recipe import load_recipe


def corpus(path: Path | str, **keys) -> Corpus:
    return Corpus(CorpusConfig(source=str(path), **keys))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(found: Corpus, start: int = 0) -> list[bytes]:
    return [document.text for document in found.documents(start)]


def test_each_kind_of_bad_row_is_counted_under_its_own_reason(tmp_path):
    path = tmp_path / "c.jsonl"
    good = '{"text": "é"}\n'.encode()
    bad = [
        b"{oops\n",
        b'{"other": 1}\n',
        b'{"text": 5}\n',
        b'{"text": ""}\n',
        b'{"text": "\\ud800"}\n',
        b'{"text": "\xff"}\n',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + good + b"".join(bad) + b"\n[1]\n" + b"[" * 100_000 + b"\n" + good.strip())
    found = corpus(path)
    assert texts(found) == ["é".encode()] * 2
    assert found.counts == {
        "documents": 2,
        "bytes": 4,
        "left out: malformed JSON": 2,
        "left out: no field 'text'": 1,
        "left out: field 'text' is not text": 1,
        "left out: empty text": 1,
        "left out: half of a surrogate pair": 1,
        "left out: not valid UTF-8": 1,
        "left out: blank line": 1,
        "left out: not a JSON object": 1,
    }


def test_compressed_lines_read_like_plain_ones(tmp_path):
    content = lines(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"}).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content[:15]) + zstandard.compress(content[15:]))
    for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst"):
        assert texts(corpus(tmp_path / name)) == [b"a", b"b"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
@pytest.mark.parametrize("lost", [1, 20, 4000])
def test_a_compressed_file_that_is_cut_off_is_named_and_never_read_as_a_shorter_one(tmp_path, compress, lost):
    content = random.Random(0).randbytes(100_000).hex().encode()
    name = f"c.jsonl.{'gz' if compress is gzip.compress else 'zst'}"
    first = compress(b'{"text": "a"}\n') if name.endswith("zst") else b""
    (tmp_path / name).write_bytes(first + compress(b'{"text": "b"}\n{"text": "' + content + b'"}\n')[:-lost])
    with pytest.raises(ValueError, match=f"{re.escape(name)} cannot be read"):
        texts(corpus(tmp_path / name))


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read"):
        texts(corpus(tmp_path / "c.parquet"))


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
    assert len(texts(corpus(path))) == 2  # the default leaves out what no tokenizer should be asked to hold


@pytest.mark.parametrize("value", [None, True, 1.5, "", {"a": 1}, "\ud800"])
def test_an_id_is_text_or_a_whole_number(tmp_path, value):
    path = lines(tmp_path / "c.jsonl", {"n": value, "text": "a"}, {"n": 7, "text": "b"}, {"n": "../é", "text": "c"})
    found = corpus(path, id_field="n")
    assert [document.doc_id for document in found.documents()] == ["7", "../é"]


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


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    lines(tmp_path / "2.jsonl", {"text": "b"})
    lines(tmp_path / "1.jsonl", {"text": "a"})
    assert texts(corpus(tmp_path / "*.jsonl")) == [b"a", b"b"]


def test_of_a_chat_the_text_is_what_the_assistant_says(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = lines(tmp_path / "c.jsonl", {"messages": chat}, {"messages": chat[:1]}, {"messages": [{"role": "user"}]})
    found = corpus(path, field="messages")
    [document] = found.documents()
    assert (document.text, document.messages) == (b"a", tuple(chat))
    assert sum(number for key, number in found.counts.items() if key.startswith("left out")) == 2


def test_documents_from_any_start_are_the_rest_of_all_documents(tmp_path):
    path = lines(tmp_path / "c.jsonl", *({"text": str(i % 7)} for i in range(20)))
    found = corpus(path, unique=True, skip=1, limit=5)
    whole = texts(found)
    assert whole == [b"1", b"2", b"3", b"4", b"5"]
    assert [texts(found, start) for start in range(6)] == [whole[start:] for start in range(6)]


def test_a_document_that_shares_any_key_is_left_out(tmp_path):
    path = lines(tmp_path / "c.jsonl", *({"text": text} for text in ("T -- one", "U -- one", "V -- two", "T -- three")))
    held_out = lines(tmp_path / "e.jsonl", {"text": "two"})
    pattern = "(?s)(?:(?P<title>.*?) -- )?(?P<body>.*)"
    found = corpus(path, unique=True, key_pattern=pattern, exclude=(CorpusConfig(source=str(held_out)),))
    assert texts(found) == [b"T -- one"]
    assert found.counts["left out: a duplicate"] == 2
    assert found.counts["left out: in an excluded corpus"] == 1


def test_a_corpus_without_a_usable_document_is_refused_with_the_counts_and_the_first_place(tmp_path):
    path = lines(tmp_path / "c.jsonl", {"txt": "a"})
    with pytest.raises(ValueError, match=r"no field 'text'.*c\.jsonl, line 1"):
        texts(corpus(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "neither a file"),
        ("*.none", "no file matches"),
        ("a.bin", "kind is not known"),
        ("loop", "a symbolic link that leads nowhere"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_the_way_out(tmp_path, name, message):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / name)


def test_a_key_pattern_without_named_groups_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no group"):
        corpus(lines(tmp_path / "c.jsonl", {"text": "a"}), key_pattern="(.*)")


def test_the_demo_trains_on_no_passage_that_shares_title_or_body_with_its_evaluation():
    recipe = load_recipe("demo")
    training = Corpus(recipe.corpus.model_copy(update={"limit": None}))
    assert recipe.eval is not None
    evaluation = Corpus(recipe.eval.model_copy(update={"limit": None, "key_pattern": recipe.corpus.key_pattern}))
    held_out = {key for document in evaluation.documents() for key in training.keys(document.text)}
    documents = list(training.documents())
    assert len(documents) == 4981
    assert all(held_out.isdisjoint(training.keys(document.text)) for document in documents)
