"""A set of keys on disk holds exactly the keys of a set in memory."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import key_set
from pipeline.corpus.documents import Corpus
from pipeline.corpus.key_set import KeySet


@pytest.mark.parametrize("held_keys", [1, 3, 64, 5000])
def test_it_holds_what_a_set_holds_whatever_is_on_disk(monkeypatch: pytest.MonkeyPatch, held_keys: int) -> None:
    monkeypatch.setattr(key_set, "_MERGED_KEYS", 100)
    for seed in range(3):
        rng = random.Random(seed)
        ours, theirs = KeySet(held_keys), set[bytes]()
        first = [rng.randbytes(8) for _ in range(40)] + [b"\0" * 8, b"\xff" * 8]  # few, so that halves are shared
        second = [rng.randbytes(8) for _ in range(40)] + [b"\0" * 8, b"\xff" * 8]
        for _ in range(600):
            keys = {rng.choice(first) + rng.choice(second) for _ in range(rng.randrange(3))}
            keys |= {rng.randbytes(16)} if rng.random() < 0.7 else set()
            asked = rng.choice(sorted(theirs)) if theirs and rng.random() < 0.5 else rng.randbytes(16)
            assert ours.isdisjoint(keys) == theirs.isdisjoint(keys) and (asked in ours) == (asked in theirs)
            ours.update(keys)
            theirs |= keys
        assert all(key in ours for key in theirs)
        assert not any(a + b in ours for a in first for b in second if a + b not in theirs)


def test_of_many_keys_two_bytes_each_stay_in_memory_in_few_files() -> None:
    keys = KeySet(held_keys=1000)
    for number in range(100):
        keys.update({random.Random(f"{number} {i}").randbytes(16) for i in range(1000)})
    assert not keys._held and len(keys._files) <= 7
    assert sum(file._filter.nbytes for file in keys._files) <= 4 * 100_000


def test_the_documents_are_the_same_however_few_keys_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    rows = [{"text": f"{rng.randrange(20)} -- {rng.randrange(60)}"} for _ in range(1500)]
    for name, part in (("c", rows), ("e", rng.sample(rows, 100))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    exclude = (CorpusConfig(source=str(tmp_path / "e.jsonl")),)
    found = []
    for keys in ({"exclude": exclude}, {"key_pattern": "(?P<title>.*?) -- (?P<body>.*)"}):
        config = CorpusConfig(source=str(tmp_path / "c.jsonl"), unique=True, **keys)  # type: ignore[arg-type]
        for held in (10**6, 7):
            monkeypatch.setattr(KeySet.__init__, "__defaults__", (held,))
            corpus = Corpus(config)
            found.append(([document.doc_id for document in corpus.documents()], corpus.counts))
    assert found[0] == found[1] and found[2] == found[3] and len(found[0][0]) > 400
    reasons = Counter(found[1][1])
    assert reasons["left out: a duplicate"] > 200 and reasons["left out: in an excluded corpus"] > 90
