"""The corpus: every row is a document or is counted under a reason, and the n-th document is always the same."""

import bz2
import gzip
import json
import lzma
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config import CorpusConfig
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from pipeline.corpus.rows import RowSource


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
    found = [row.columns for row in RowSource.resolve(str(tmp_path / "c.parquet"), "train", 10**6).rows()]
    assert found == list(load_dataset("parquet", data_files=str(tmp_path / "c.parquet"), split="train"))


def test_a_parquet_row_whose_text_is_not_utf8_costs_that_row_alone(tmp_path):
    values = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "c.parquet")
    found = corpus(tmp_path / "c.parquet")
    assert texts(found) == [b"a", b"b"] and found.counts["left out: not valid UTF-8"] == 1


ARRAYS = {
    "on one line": '[{"text": "a]}"}, {"text": "b\\"[{"}]',
    "an element a line": '[\n{"text": "a]}"},\n{"text": "b\\"[{"}\n]\n',
    "commas first": '[{"text": "a]}"}\r\n, {"text": "b\\"[{"}\r\n]',
    "pretty": json.dumps([{"text": "a]}"}, {"text": 'b"[{', "deep": [{"x": [1, "]"]}]}], indent=2),
    "with a mark": '\ufeff [ {"text": "a]}"}, {"text": "b\\"[{"} ]\n\n',
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_an_array_of_json_objects_reads_like_its_lines(tmp_path, monkeypatch, name, chunk_bytes):
    monkeypatch.setattr("pipeline.corpus.json_array._CHUNK_BYTES", chunk_bytes)
    for file in ("c.json", "c.jsonl"):
        (tmp_path / file).write_text(ARRAYS[name], encoding="utf-8")
        found = corpus(tmp_path / file)
        assert texts(found) == [b"a]}", b'b"[{'] and found.counts == {"documents": 2, "bytes": 7}


def test_random_arrays_give_their_elements_whatever_their_layout(tmp_path, monkeypatch):
    for seed in range(60):
        rng = random.Random(seed)
        monkeypatch.setattr("pipeline.corpus.json_array._CHUNK_BYTES", rng.choice([1, 2, 5, 64]))
        rows = [
            {"text": "".join(rng.choices('a"\\[]{},\n é', k=rng.randrange(1, 12))), "more": [[i], {}]} for i in range(5)
        ]
        layout = {"indent": rng.choice([None, 0, 3]), "ensure_ascii": bool(rng.randrange(2))}
        (tmp_path / "c.json").write_text(json.dumps(rows, **layout), encoding="utf-8")
        assert texts(corpus(tmp_path / "c.json")) == [row["text"].encode() for row in rows]


def test_an_array_that_breaks_off_or_holds_bad_elements_says_so_and_loses_no_other(tmp_path):
    rows = ['{"text": "a"}', "5", '{"text": "' + "y" * 99 + '"}', '{"text": oops}', '{"text": "b"}']
    path = tmp_path / "c.json"
    path.write_text("[" + ", ".join(['{"text": "0"}', *rows]) + "]")
    found = corpus(path, max_row_bytes=50)
    assert texts(found) == [b"0", b"a", b"b"]
    assert {key: n for key, n in found.counts.items() if key.startswith("left")} == {
        "left out: not a JSON object": 1,
        "left out: longer than corpus.max_row_bytes": 1,
        "left out: malformed JSON": 1,
    }
    assert found.first_places["malformed JSON"] == f"{path}, element 5"
    path.write_text('[{"text": "a"},\n{"text": "b"}')  # cut off: nobody knows whether the last is whole
    found = corpus(path)
    assert texts(found) == [b"a"] and found.counts["left out: malformed JSON"] == 1


def test_lines_whose_first_starts_with_a_bracket_are_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    for first in ('[{"text": "x"}', '[{"text": "x', '[{"text": ["x"}', '[{"text": "x"} {', '[{"text": "x"},]'):
        path.write_text(first + '\n{"text": "a"}\n{"text": "b"}\n')
        found = corpus(path)
        kept = [b"x"] if first.endswith(",]") else []
        assert texts(found) == [*kept, b"a", b"b"], first
        assert found.counts.get("left out: malformed JSON", 0) == 1 - len(kept)


def test_a_json_file_of_one_object_over_many_lines_is_refused_with_what_is_read(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"data": [{"text": "a"}]}, indent=1))
    with pytest.raises(ValueError, match="as one object a line, or as one array of objects"):
        texts(corpus(tmp_path / "c.json"))


def test_a_byte_order_mark_is_no_text_whatever_holds_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfsix"))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf")
    found = corpus(tmp_path, max_row_bytes=20)
    assert texts(found) == [b"one", b"two", b"six"] and found.counts["left out: empty text"] == 1
    assert texts(corpus(tmp_path / "a.txt", max_row_bytes=3)) == [b"one"]


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress], ids=["gz", "zst", "bz2", "xz"]
)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.xz"])
def test_what_is_compressed_is_read_whatever_its_name_says(tmp_path, compress, name):
    content = lines(tmp_path / "plain.jsonl", {"text": "a"}, {"text": "b"}).read_bytes()
    (tmp_path / name).write_bytes(compress(content))
    assert texts(corpus(tmp_path / name)) == [b"a", b"b"]


def test_under_the_first_arithmetic_files_read_as_they_did(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.json").write_text('[\n{"text": "x"},\n{"text": "y"}\n]\n')
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    found = Corpus(CorpusConfig(source=str(tmp_path)), arithmetic=1)
    assert texts(found) == [b"\xef\xbb\xbfone", b"y"]


class Hub:
    """A stand-in for a hub that gives this answer when it is asked for a data set."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def dataset_info(self, name: str, timeout: float) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", ["there is none", "no way there"])
def test_a_mistyped_folder_is_said_to_be_missing_at_once(tmp_path, monkeypatch, error):
    from httpx2 import ConnectError, Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    answer = Response(404, request=Request("GET", "https://hub"))
    errors = {
        "there is none": RepositoryNotFoundError("none", response=answer),
        "no way there": ConnectError("refused"),
    }
    hub = Hub(errors[error])
    monkeypatch.setattr("pipeline.dumps.hub._api", lambda: hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file or folder 'data/trian' \(from .*data set of that name"):
        corpus("data/trian")
    assert hub.asked == 1


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


def test_links_to_folders_are_followed_and_lead_in_no_circle(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "deep" / "b.txt").write_text("b")
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (tmp_path / "in" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "d.txt").write_text("d")
    assert texts(corpus(tmp_path / "in")) == [b"a", b"b", b"c"]
    assert texts(corpus(tmp_path / "in/**/*.txt")) == [b"a", b"b", b"c"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert texts(corpus(tmp_path / "in")) == [b"a", b"b", b"c"]
    before = Corpus(CorpusConfig(source=str(tmp_path / "in")), 1)  # a dump that was begun so goes on so
    assert texts(before) == [b"d", b"a", b"b"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "data[1].txt").write_text("one")
    (tmp_path / "data1.txt").write_text("another")
    assert texts(corpus(tmp_path / "data[1].txt")) == [b"one"]
    assert texts(corpus(tmp_path / "dat?1.txt")) == [b"another"]


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
