"""JSON files that are one array of objects."""

import json
import random

import pytest

from tests.support.corpus_files import corpus, texts

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
