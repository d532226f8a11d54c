"""The snippets of the specification, run as they stand, against the schema's own reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas import END
from schemas.manifest import Manifest, ShardPlan
from schemas.shard import Record, Segment, commit_shard, read_shard, to_table
from schemas.snippets import snippets

ROOT = Path(__file__).resolve().parents[2]
POSITION = 10  # of document "0", as the snippets have it


def varied_record(doc_id: str, seed: int, document: bytes = b"a document of bytes, with an end") -> Record:
    """Between 1 and 6 entries a position, the realised symbol among them, and some mass left for the tail."""
    rng = np.random.default_rng(seed)
    realised = np.frombuffer(document + bytes([END]), dtype=np.uint8)
    counts = rng.integers(1, 7, len(realised)).astype(np.uint16)
    symbols, logprobs = [], []
    for symbol, count in zip(realised.tolist(), counts.tolist(), strict=True):
        others = rng.choice(np.delete(np.arange(256), symbol), count - 1, replace=False).tolist()
        probs = np.sort(rng.dirichlet(np.ones(count + 1))[:count])[::-1]
        symbols += rng.permutation([symbol, *others]).tolist()
        logprobs += np.log(np.maximum(probs, 1e-3)).tolist()
    num = len(realised)
    return Record(
        doc_id=doc_id,
        window_start=0,
        document=document,
        segments=(Segment(0, len(document), True),),
        teacher_token_lengths=np.full(len(document) // 2, 2, dtype=np.int32),
        teacher_token_logprobs=np.full(len(document) // 2, -1.0, dtype=np.float32),
        entry_counts=counts,
        dropped=np.zeros(num, dtype=np.float16),
        token_end=np.zeros(num, dtype=np.float16),
        doubt=np.zeros(num, dtype=np.float16),
        symbols=np.array(symbols, dtype=np.uint8),
        logprobs=np.minimum(np.array(logprobs), 0).astype(np.float16),
    )


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; document "0" is not the first record."""
    folder = tmp_path_factory.mktemp("dump")
    (folder / "shards").mkdir()
    plans = [ShardPlan(index=i, first_document=i, num_documents=1, num_bytes=1, sha256=str(i)) for i in range(2)]
    Manifest(identity={}, corpus_counts={}, shards=tuple(plans)).save(folder)
    for plan, ids in zip(plans, (["7", "8"], ["1", "0"]), strict=True):
        records = [varied_record(doc_id, int(doc_id)) for doc_id in ids]
        assert not [fault for record in records for fault in record.faults()]
        commit_shard(to_table(records, {}), plan.path(folder), zstd_level=1)
    return folder


@pytest.fixture(scope="module")
def expected(dump: Path) -> dict[int, float]:
    records = [r for path in sorted((dump / "shards").iterdir()) for r in read_shard(path) if r.doc_id == "0"]
    start = int(records[0].entry_counts[:POSITION].sum())
    entries = slice(start, start + int(records[0].entry_counts[POSITION]))
    probabilities = np.exp(records[0].logprobs[entries].astype(np.float64)).tolist()
    return dict(zip(records[0].symbols[entries].tolist(), probabilities, strict=True))


def run_python(code: str) -> dict[int, float]:
    names: dict[str, Any] = {}
    exec(compile(code, "schemas/README.md", "exec"), names)
    return {int(symbol): float(probability) for symbol, probability in names["probabilities"].items()}


def run_sql(code: str) -> dict[int, float]:
    duckdb = pytest.importorskip("duckdb")
    return dict(duckdb.sql(code).fetchall())


RUNNERS: dict[str, Callable[[str], dict[int, float]]] = {"python": run_python, "sql": run_sql}


@pytest.mark.parametrize("name", ["pyarrow", "duckdb", "polars", "datasets"])
def test_a_snippet_reconstructs_the_distribution_at_a_position(
    name: str, dump: Path, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(name)
    if name == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # not the user's own
    monkeypatch.chdir(dump)
    language, code = snippets()[name]
    found = RUNNERS[language](code)
    assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-4)


def test_the_specification_shows_every_way_of_reading_and_the_first_takes_at_most_ten_lines() -> None:
    assert set(snippets()) == {"pyarrow", "duckdb", "polars", "datasets"}
    assert len([line for line in snippets()["pyarrow"].code.splitlines() if line]) <= 10


def test_the_readme_shows_what_the_specification_shows() -> None:
    shown = snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown and shown.items() <= snippets().items()
