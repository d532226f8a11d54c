"""A shard and a manifest go through the reader of the version they declare."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import schemas
from schemas.dump_files import MANIFEST, Key
from schemas.manifest import Manifest
from schemas.shard import read_record_texts, read_shard
from schemas.versions import READERS, reader, v1, v2, v3
from tests.schemas.make_golden import FOLDER

GOLDEN = FOLDER / "version-1.parquet"
RENAMED = {"wording": "document", "opens": "entry_counts"}


def test_there_is_a_reader_of_every_version_that_is_read() -> None:
    assert set(READERS) == set(schemas.READS)
    assert reader("x", 1) is reader("x", "1") is v1
    assert reader("x", "2") is v2 and reader("x", 3) is v3


def as_version_7(batch: pa.RecordBatch) -> v1.Rows:
    return v1.rows(batch.rename_columns([RENAMED.get(name, name) for name in batch.schema.names]))


def manifest_of_7(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in values.items() if k != "counts"}, "corpus_counts": values["counts"]}


@pytest.fixture
def another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a made-up version whose files have other names for two columns and a field."""

    def check(path: object, schema: pa.Schema) -> None:
        assert "wording" in schema.names

    def text_columns(schema: pa.Schema, with_tokens: bool) -> list[str]:
        back = {name: old for old, name in RENAMED.items()}
        return [back.get(name, name) for name in v1.record_text_columns(schema, with_tokens)]

    made = SimpleNamespace(
        check_columns=check,
        rows=as_version_7,
        record_text_columns=text_columns,
        manifest=manifest_of_7,
        shard_schema=None,
    )
    monkeypatch.setattr(schemas, "READS", (1, 7))
    monkeypatch.setitem(READERS, 7, made)


def shard_of_7(folder: Path) -> Path:
    table = pq.read_table(GOLDEN)
    back = {name: old for old, name in RENAMED.items()}
    other = table.rename_columns([back.get(name, name) for name in table.column_names])
    metadata = {**(table.schema.metadata or {}), Key.SCHEMA_VERSION.encode(): b"7"}
    pq.write_table(other.replace_schema_metadata(metadata), folder / "part.parquet")
    return folder / "part.parquet"


@pytest.mark.usefixtures("another_version")
def test_a_shard_is_read_by_the_reader_of_its_own_version(tmp_path: Path) -> None:
    there, ours = list(read_shard(shard_of_7(tmp_path))), list(read_shard(GOLDEN))
    assert [record.document for record in there] == [record.document for record in ours]
    assert [record.entry_counts.tolist() for record in there] == [record.entry_counts.tolist() for record in ours]
    texts = list(read_record_texts(shard_of_7(tmp_path), with_tokens=True))
    assert [text.segments for text in texts] == [record.segments for record in ours]


@pytest.mark.usefixtures("another_version")
def test_a_manifest_is_read_by_the_reader_of_its_own_version(tmp_path: Path) -> None:
    values = {"schema_version": 7, "identity": {"a": 1}, "counts": {"used": 3}, "shards": []}
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    assert Manifest.load(tmp_path).corpus_counts == {"used": 3}
    (tmp_path / MANIFEST).write_text(json.dumps(values | {"schema_version": 1}))
    with pytest.raises(ValueError, match="corpus_counts"):
        Manifest.load(tmp_path)


def test_another_version_is_refused_by_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema version '7'; this release reads 1, 2 and 3"):
        next(read_shard(shard_of_7(tmp_path)))
    with pytest.raises(ValueError, match="schema version '7'"):
        next(read_record_texts(shard_of_7(tmp_path)))


def test_a_column_of_another_type_is_refused_and_one_more_does_no_harm(tmp_path: Path) -> None:
    table = pq.read_table(GOLDEN)
    pq.write_table(table.append_column("mine", pa.nulls(len(table))), tmp_path / "more.parquet")
    assert len(list(read_shard(tmp_path / "more.parquet"))) == len(table)
    at = table.schema.get_field_index("doubt")
    pq.write_table(table.set_column(at, "doubt", pa.nulls(len(table))), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match=r"column doubt is null, the format says list<element: float not null> not null$"
    ):
        next(read_shard(tmp_path / "other.parquet"))
    pq.write_table(table.drop_columns(["doubt"]), tmp_path / "less.parquet")
    with pytest.raises(ValueError, match="column doubt is missing"):
        next(read_shard(tmp_path / "less.parquet"))
