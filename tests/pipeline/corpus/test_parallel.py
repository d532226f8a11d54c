"""Several processes find what one finds, in the same order, however the corpus is cut."""

import json
import random
from pathlib import Path

import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import parallel, parts
from pipeline.corpus.digest import document_digest
from pipeline.corpus.documents import Corpus, PlacedDocument
from pipeline.corpus.rows import RowSource
from tests.pipeline.corpus.test_places import write_corpus


class InThisProcess:
    """Protocol of the pool that `found_in_parallel` uses."""

    def __init__(self, processes: int, context: object, initializer: object, initargs: tuple[object, ...]) -> None:
        config, source = initargs
        parallel._corpus[:] = [Corpus(config, source.arithmetic, source)]  # type: ignore[arg-type,attr-defined]

    def submit(self, run, task):  # type: ignore[no-untyped-def]
        from concurrent.futures import Future

        future = Future()  # type: ignore[var-annotated]
        try:
            future.set_result(run(task))
        except ValueError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how: object) -> None:
        parallel._corpus.clear()


def stated(placed: PlacedDocument) -> tuple[object, ...]:
    document = placed.document
    return document.doc_id, len(document.text), document_digest(document), placed.place, placed.filtered


@pytest.mark.parametrize("arithmetic", [1, 2])
@pytest.mark.parametrize("part_bytes", [1, 17, 400, 10**6])
def test_it_finds_what_one_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: int, part_bytes: int
) -> None:
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(parallel, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(parts, "_CHUNK_BYTES", 7)
    write_corpus(tmp_path, random.Random(part_bytes), number=12)
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n' + "x" * 300 + '\n\n{"text": "' + "y" * 200 + '"}\n')
    (tmp_path / "void.jsonl").write_text("")
    for keys in ({}, {"unique": True, "skip": 2}, {"unique": True, "limit": 12}):
        config = CorpusConfig(source=str(tmp_path), max_row_bytes=50, **keys)  # type: ignore[arg-type]
        one, several = Corpus(config, arithmetic), Corpus(config, arithmetic)
        alone = [stated(placed) for placed in one.placed()]
        together = [stated(placed) for placed in several.placed(parallel.found_in_parallel(several))]
        assert together == alone and len(alone) > 10
        assert (several.counts, several.first_places) == (one.counts, one.first_places)


def test_parts_have_all_rows_of_a_file_and_each_once(tmp_path: Path) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        content = "".join(rng.choice(["\n", "a", "bb\n", "é\n", "c" * 20]) for _ in range(60))
        (tmp_path / "c.jsonl").write_text(content)
        source = RowSource.resolve(str(tmp_path / "c.jsonl"), "train", 10**6)
        places = [place for place, _ in source.rows()]
        row = 0
        for part in parts.parts(source, rng.randrange(1, 30)):
            byte, num_rows = parts.count(source, part)
            assert not num_rows or byte == places[row].byte
            row += num_rows
        assert row == len(places)


def test_a_damaged_file_is_named_where_it_lies_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", InThisProcess)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8bhalf")
    corpus = Corpus(CorpusConfig(source=str(tmp_path)))
    found = parallel.found_in_parallel(corpus)
    assert [next(found)[0].number for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz cannot be read"):
        next(found)
    short = Corpus(CorpusConfig(source=str(tmp_path), limit=2))
    assert len(list(short.placed(parallel.found_in_parallel(short)))) == 2


def test_processes_of_their_own_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_PART_BYTES", 2000)
    monkeypatch.setattr(parallel, "_num_cores", lambda: 2)
    rows = ({"text": f"number {number % 400}"} for number in range(500))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(CorpusConfig(source=str(tmp_path / "c.jsonl"), unique=True))
    together = [stated(placed) for placed in corpus.placed(parallel.found_in_parallel(corpus))]
    assert together == [stated(placed) for placed in corpus.placed()] and len(together) == 400
