"""Documents are found again by their places, whatever holds them and in whatever order they are asked for."""

import bz2
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config import CorpusConfig
from pipeline.corpus import rows
from pipeline.corpus.documents import Corpus, Document


def some_rows(rng: random.Random, number: int) -> list[object]:
    """Return rows of which some are no documents, and some repeat an earlier one."""
    good = [{"text": "".join(rng.choices("abcé\n", k=rng.randrange(1, 4)))} for _ in range(number)]
    return [rng.choice([row, row, row, {"text": ""}, {"text": 5}, {"text": "y" * 60}]) for row in good]


def write_corpus(folder: Path, rng: random.Random, number: int = 40) -> None:
    """Write a file of each kind."""
    mark = b"\xef\xbb\xbf"
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.bz2", "i.jsonl"):
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in some_rows(rng, number))
        content = mark + lines.replace(b"\n", b"\n\n", 1) + b'{"text": "last"}'
        half = len(content) // 2
        kind = name.rpartition(".")[2]
        if kind == "zst":
            content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
        else:
            content = {"gz": gzip.compress, "bz2": bz2.compress}.get(kind, bytes)(content)
        (folder / name).write_bytes(content)
    array = json.dumps(some_rows(rng, number), indent=rng.choice([None, 1]))
    (folder / "e.json").write_text("[" + json.dumps({"text": "z"}) + "," + array[1:] + '\n{"text": "behind"}\n')
    values = [row["text"] if isinstance(row["text"], str) else None for row in some_rows(rng, number)]  # type: ignore[index]
    pq.write_table(pa.table({"text": values}), folder / "f.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "g.parquet")
    (folder / "h.txt").write_text("a whole file")


@pytest.mark.parametrize("keys", [{}, {"unique": True}, {"unique": True, "skip": 3, "limit": 90}, {"exclude": True}])
def test_every_run_of_documents_is_read_from_its_place_in_any_order(tmp_path: Path, keys: dict[str, object]) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_corpus(folder, rng)
        (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"text": "last"}\n')
        if keys.get("exclude"):
            keys = {"exclude": (CorpusConfig(source=str(tmp_path / "other.jsonl")),)}
        corpus = Corpus(CorpusConfig(source=str(folder), max_row_bytes=50, **keys))  # type: ignore[arg-type]
        placed = list(corpus.placed())
        whole = [one.document for one in placed]
        assert whole == list(corpus.documents()) and len(whole) > 40
        runs = [(at, min(at + rng.randrange(1, 12), len(whole))) for at in range(0, len(whole), 3)]
        rng.shuffle(runs)
        for order in (runs, sorted(runs)):
            reader = corpus.reader()
            for start, end in order:
                filtered = {number for one in placed[start + 1 : end] for number in one.filtered}
                found: list[Document] = reader.read(placed[start].place, end - start, filtered)
                assert found == whole[start:end], (seed, start, end)


def test_the_runs_of_a_compressed_file_in_order_are_read_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"text": f"number {i} " + "x" * 5000}) + "\n" for i in range(200))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    corpus = Corpus(CorpusConfig(source=str(tmp_path / "c.jsonl.gz")))
    placed = list(corpus.placed())
    parsed: list[str] = []
    parse = rows._json_row
    monkeypatch.setattr(rows, "_json_row", lambda line, where: parsed.append(where) or parse(line, where))
    opened: list[str] = []
    open_it = rows.opened
    monkeypatch.setattr(rows, "opened", lambda name, **how: opened.append(name) or open_it(name, **how))
    reader = corpus.reader()
    for at in range(0, 200, 10):
        assert reader.read(placed[at].place, 2, frozenset()) == [one.document for one in placed[at : at + 2]]
    assert len(opened) == 1 and len(parsed) == 40  # what lies between is decompressed, and not parsed


def test_a_file_that_is_not_compressed_is_not_read_before_the_place(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 80}).encode() + b"\n"
    path = tmp_path / "c.jsonl"
    path.write_bytes(line * 50_000)
    corpus = Corpus(CorpusConfig(source=str(path)))
    place = list(corpus.placed())[49_999].place
    with path.open("r+b") as file:
        file.write(b"\xff" * (place.byte - 1))  # lines before: not even their ends are looked for
    [document] = corpus.reader().read(place, 1, frozenset())
    assert (document.doc_id, document.text) == ("49999", b"x" * 80)
