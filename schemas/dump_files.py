"""Names of a dump's files, and keys of its shards' metadata, each written here and nowhere else.

README.md beside this file says what they hold.
"""

from enum import StrEnum

MANIFEST = "manifest.json"
SUMMARY = "summary.json"  # written last, as in a student's run
AUDIT = "audit.json"
INPUTS = "inputs.json"
RECIPE = "recipe.yaml"  # resolved, as in a student's run
CARD = "README.md"
SHARDS = "shards"  # folders, the next three too
COSTS = "costs"
LEASES = "claims"  # in an object store, in place of
LOCK = "claims.lock"
SHARD_SUFFIX = ".parquet"
SHARD_GLOB = f"*{SHARD_SUFFIX}"
SHARD_FILES = f"{SHARDS}/{SHARD_GLOB}"  # of a dump, as a glob

_PART = "part-"
PARTIAL_FILES = f"*/{_PART}*.partial"  # half-written files of single shards: of a dump, as a glob


class Key(StrEnum):
    """A key of a shard's Parquet metadata; values are text."""

    SCHEMA_VERSION = "bld.schema_version"
    IDENTITY = "bld.identity"  # JSON
    UNITS = "bld.units"
    DECODING = "bld.decoding"
    LEFT_OUT = "bld.left_out"  # JSON: documents left out, by name, and why
    TEACHER_TOKENS = "bld.teacher_tokens"
    COMPUTED_TOKENS = "bld.computed_tokens"
    SHARD_SHA256 = "bld.shard_sha256"  # of its documents
    ENGINE = "bld.engine"
    LIBRARIES = "bld.libraries"  # JSON
    AUDIT = "bld.audit"  # JSON
    SHA256 = "bld.sha256"  # the seal, over the whole file
    COUNTED_OF = "bld.counted_of"  # of a run's token counts, which are sealed as shards are


def part_name(index: int) -> str:
    """Name of what belongs to one shard, without a suffix."""
    return f"{_PART}{index:05d}"


def part_index(name: str) -> int:
    """Number of the shard that a file of this name belongs to. Raises ValueError where it is not a shard's."""
    return int(name.removeprefix(_PART).split(".")[0])


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"{part_name(index)}{SHARD_SUFFIX}"
