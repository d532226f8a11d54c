"""Completeness of a dump: every planned shard exists, with the size and checksum that the summary gives."""

import hashlib
from pathlib import Path

from pipeline.runtime.format import count_of
from schemas import dump_files
from schemas.manifest import Manifest, read_json


def dump_faults(dump: Path) -> list[str]:
    """List what a dump lacks, in words; empty if it is complete. Reads every byte.

    Raises ValueError if the folder is not a dump.
    """
    manifest = Manifest.load(dump)
    path = dump / dump_files.SUMMARY
    if not path.exists():
        done = sum(shard.path(dump).exists() for shard in manifest.shards)
        return [
            f"{path} is missing: the dump was not finished ({done} of {count_of(len(manifest.shards), 'shard')} exist)"
        ]
    listed = {str(shard["name"]): shard for shard in read_json(path, "shards")["shards"]}
    planned = {shard.path(dump).name: shard.path(dump) for shard in manifest.shards}
    if listed.keys() != planned.keys():
        other = ", ".join(sorted(listed.keys() ^ planned.keys())[:5])
        return [f"{path} and manifest.json list different shards ({other})"]
    if manifest.has_tokens and not (dump / dump_files.VOCABULARY).exists():
        return [f"{dump / dump_files.VOCABULARY} is missing"]
    return [fault for name, file in planned.items() for fault in _shard_faults(file, listed[name])]


def _shard_faults(file: Path, listed: dict[str, object]) -> list[str]:
    if not file.exists():
        return [f"{file} is missing"]
    if file.stat().st_size != listed["bytes"]:
        return [f"{file} has {file.stat().st_size} bytes; the summary gives {listed['bytes']}"]
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return [] if digest == listed["sha256"] else [f"{file}: its sha256 differs from the one in the summary"]


def require_complete(dump: Path, way_out: str) -> None:
    """Raise ValueError, naming up to five faults and the way out, unless the dump is complete."""
    faults = dump_faults(dump)
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{dump} is not complete: {'; '.join(faults[:5])}{more}. {way_out}")
