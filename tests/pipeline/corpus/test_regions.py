"""Supervised regions of a corpus: patterns and byte ranges, and what they leave out."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.digest import document_digest
from pipeline.corpus.documents import Corpus, Document
from pipeline.corpus.regions import NOTHING
from schemas.record import Segment


def read(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[Corpus, list[Document]]:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = Corpus(CorpusConfig.model_validate({"source": str(path), **keys}))
    return corpus, list(corpus.documents())


def brute_force(text: str, pattern: str) -> set[int]:
    """Return the bytes that a pattern's matches hold, character by character."""
    held: set[int] = set()
    for match in re.finditer(pattern, text):
        start, end = match.span("supervised") if "supervised" in match.groupdict() else match.span()
        held |= set(range(len(text[:start].encode()), len(text[:end].encode())))
    return held


@pytest.mark.parametrize(
    "pattern", ["a+", "(?s)x(?P<supervised>.*?)y", "(?=(?P<supervised>\\w{1,3}))", "[^ ]", "(?m)^.*$", "\U0001f600é?"]
)
def test_a_pattern_selects_the_bytes_that_its_matches_hold(tmp_path: Path, pattern: str) -> None:
    rng = np.random.default_rng(len(pattern))
    alphabet = ["a", "x", "y", "é", "\U0001f600", "語", " ", "\n"]
    rows = [{"text": "".join(rng.choice(alphabet, size=rng.integers(1, 40)))} for _ in range(60)]
    expected = {str(i): held for i, row in enumerate(rows) if (held := brute_force(row["text"], pattern))}
    corpus, documents = read(tmp_path, rows, supervise={"pattern": pattern})
    assert [document.doc_id for document in documents] == list(expected)
    for document in documents:
        assert document.segments is not None
        parts = [range(s.start, s.start + s.length) for s in document.segments]
        assert sorted(byte for part in parts for byte in part) == sorted(expected[document.doc_id])
        assert all(a.stop < b.start for a, b in pairwise(parts)), "parts that touch are one"
        assert [s.has_end for s in document.segments] == [part.stop == len(document.text) for part in parts]
    left_out = {} if len(expected) == len(rows) else {f"left out: {NOTHING}": len(rows) - len(expected)}
    assert {key: value for key, value in corpus.counts.items() if key.startswith("left out")} == left_out
    if left_out:
        assert "line" in corpus.first_places[NOTHING]


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ([[4, 6], [2, 3]], "field 'spans' holds ranges that overlap, descend or lie outside the text"),
        ([[0, 9]], "field 'spans' holds ranges that overlap, descend or lie outside the text"),
        ([[-1, 2]], "field 'spans' holds ranges that overlap, descend or lie outside the text"),
        ([[0, 1, 2]], "field 'spans' holds something else than pairs of whole numbers, start and end"),
        (
            [{"start": 1, "length": 3}],
            "field 'spans' holds something else than pairs of whole numbers, start and end",
        ),
        ([[0, True]], "field 'spans' holds something else than pairs of whole numbers, start and end"),
        ("0-3", "field 'spans' is not a list of byte ranges"),
        ([[3, 3]], NOTHING),
        ([], NOTHING),
    ],
)
def test_a_row_whose_ranges_are_none_is_left_out_with_the_reason(tmp_path: Path, ranges: object, reason: str) -> None:
    rows = [
        {"text": "é and é", "spans": [[0, 2], {"start": 2, "end": 4}, [7, 9]]},
        {"text": "another", "spans": ranges},
    ]
    corpus, [document] = read(tmp_path, rows, supervise={"field": "spans"})
    assert document.segments == (Segment(0, 4, False), Segment(7, 2, True))
    assert corpus.counts[f"left out: {reason}"] == 1


def test_of_a_chat_the_last_turn_is_selected(tmp_path: Path) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("assistant", ""), ("user", "e")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in said]}]
    _, [document] = read(tmp_path, rows, field="messages", supervise={"turns": "last"})
    assert document.turns == (3,)
    _, [whole] = read(tmp_path, rows, field="messages")
    assert whole.turns is None
    assert document_digest(whole) != document_digest(document)


def test_what_is_supervised_is_part_of_a_documents_hash() -> None:
    parts = [(Segment(0, 2, False),), (Segment(0, 2, True),), (Segment(0, 1, False), Segment(1, 1, False)), None]
    hashes = {document_digest(Document("0", b"ab", None, segments=segments)) for segments in parts}
    assert len(hashes) == len(parts)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"supervise": {}}, "exactly one"),
        ({"supervise": {"pattern": "a", "field": "b"}}, "pattern and field"),
        ({"supervise": {"pattern": "("}}, "not a regular expression"),
        ({"supervise": {"turns": "last"}}, "plain text"),
        ({"supervise": {"pattern": "a"}, "field": "messages"}, "turns: last"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        CorpusConfig.model_validate({"source": "a.jsonl", **keys})
