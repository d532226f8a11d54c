"""The snippets of the specification, run as they stand, against the schema's own reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.shard import read_shard
from schemas.snippets import snippets
from tests.support.readable_dumps import varied_record, write_dump

ROOT = Path(__file__).resolve().parents[2]
POSITION = 10  # of document "0", as the snippets have it


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two shards; document "0" is not the first record."""
    shards = [[varied_record(doc_id, int(doc_id)) for doc_id in ids] for ids in ("78", "10")]
    return write_dump(tmp_path_factory.mktemp("dump"), shards)


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
