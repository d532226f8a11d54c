"""A shard of every version ever released is still read, value for value.

For a version that is not read, the error says what reads it.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas import READS, RELEASES, SCHEMA_VERSION, version_fault
from schemas.manifest import Manifest
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from tests.schemas.make_golden import FOLDER, golden_values


def assert_close(found: object, expected: object) -> None:
    """Check equality up to the last digit of what was rounded."""
    if isinstance(expected, dict) and isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == pytest.approx(expected, abs=2e-3) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("version", sorted(RELEASES))
def test_a_shard_of_every_released_version_is_read_or_its_reader_is_named(version: int) -> None:
    shard = FOLDER / f"version-{version}.parquet"
    if version not in READS:
        with pytest.raises(ValueError, match=RELEASES[version]):
            next(read_shard(shard))
        return
    assert_close(golden_values(shard), json.loads(shard.with_suffix(".json").read_text()))
    assert not [fault for record in read_shard(shard) for fault in record_faults(record)]


def test_what_is_written_is_read_and_released() -> None:
    assert SCHEMA_VERSION in READS and set(READS) <= set(RELEASES)


@pytest.mark.parametrize("version", [99, "99", "x", None])
def test_a_version_that_is_not_known_is_refused_with_the_way_out(version: object) -> None:
    fault = version_fault("a/file", version)
    assert fault and "a/file" in fault and "this release reads 1" in fault and "newer bld" in fault


def test_shard_and_manifest_of_another_version_are_refused(tmp_path: Path) -> None:
    table = pq.read_table(FOLDER / "version-1.parquet")
    other = table.replace_schema_metadata({**(table.schema.metadata or {}), b"bld.schema_version": b"99"})
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="schema version '99'"):
        next(read_shard(tmp_path / "other.parquet"))
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99"):
        Manifest.load(tmp_path)
