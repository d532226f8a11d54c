"""The snippets of the specification, run as they stand, against the schema's own reader."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.snippets import snippets
from tests.schemas.test_stored_entries import drawn
from tests.support.readable_dumps import varied_record, write_dump

ROOT = Path(__file__).resolve().parents[2]
POSITION = 10  # of document "0", as the snippets have it


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Write two shards in each version; document "0" is not the first record."""
    shards = [[varied_record(doc_id, int(doc_id)) for doc_id in ids] for ids in ("78", "10")]
    folder = tmp_path_factory.mktemp("dumps")
    return {version: write_dump(folder / str(version), shards, version=version) for version in (1, 3)}


@pytest.fixture(scope="module")
def expected() -> dict[int, float]:
    record = varied_record("0", 0)
    start = int(record.entry_counts[:POSITION].sum())
    entries = slice(start, start + int(record.entry_counts[POSITION]))
    probabilities = np.exp(record.logprobs[entries].astype(np.float64)).tolist()
    return dict(zip(record.symbols[entries].tolist(), probabilities, strict=True))


def run_python(code: str) -> dict[int, float]:
    names: dict[str, Any] = {}
    exec(compile(code, "schemas/README.md", "exec"), names)
    return {int(symbol): float(probability) for symbol, probability in names["probabilities"].items()}


def run_sql(code: str) -> dict[int, float]:
    duckdb = pytest.importorskip("duckdb")
    return dict(duckdb.sql(code).fetchall())


RUNNERS: dict[str, Callable[[str], dict[int, float]]] = {"python": run_python, "sql": run_sql}


@pytest.mark.parametrize(
    ("version", "name"),
    [(3, "pyarrow"), (3, "duckdb"), (3, "polars"), (3, "datasets"), (1, "pyarrow"), (1, "datasets")],
)
def test_a_snippet_reconstructs_the_distribution_at_a_position(
    version: int,
    name: str,
    dumps: dict[int, Path],
    expected: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip(name)
    if name == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # not the user's own
    monkeypatch.chdir(dumps[version])
    language, code = snippets(version=version)[name]
    found = RUNNERS[language](code)
    assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_snippet_of_token_end_gives_what_a_record_has(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = drawn(seed)
    monkeypatch.chdir(write_dump(tmp_path / "dump", [[replace(record, doc_id="0")]]))
    names: dict[str, Any] = {}
    exec(compile(snippets()["token_end"].code, "schemas/README.md", "exec"), names)
    np.testing.assert_array_equal(np.array(names["token_end"], np.float32), record.token_end)


def test_the_specification_shows_every_way_of_reading_and_the_first_takes_at_most_ten_lines() -> None:
    assert set(snippets()) == {"pyarrow", "duckdb", "polars", "datasets", "token_end"}
    assert set(snippets(version=1)) == set(snippets(version=2)) == {"pyarrow", "datasets"}
    assert len([line for line in snippets()["pyarrow"].code.splitlines() if line]) <= 10


def test_the_readme_shows_what_the_specification_shows() -> None:
    shown = snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown and shown.items() <= snippets().items()
