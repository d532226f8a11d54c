"""The names of a dump's files and the keys of its shards' metadata, each defined only here.

README.md beside this file says what they hold.
"""

from enum import StrEnum

MANIFEST = "manifest.json"
SUMMARY = "summary.json"  # written last, as in a student's run
AUDIT = "audit.json"
INPUTS = "inputs.json"
PLACES = "places.parquet"
VOCABULARY = "vocabulary.parquet"  # bytes of the teacher's tokens, if a dump has alternatives of them
PLACES_KEY = b"bld.places"  # of its metadata: JSON
RECIPE = "recipe.yaml"  # resolved, as in a student's run
CARD = "README.md"
TEXT_MANIFEST = "corpus.json"  # of a corpus of written text, in place of a dump's manifest
RUN_IDENTITY = "identity.json"  # of a student's run
DISTILLED = "distilled.json"  # in an exported student: the checkpoint that it was made from
START = "start"  # a folder of a student's run: the student before its first step
TRANSFER = "transfer.json"  # in START: rows by kind, and how they were made; empty if the tokenizer stayed
SHARDS = "shards"  # a folder, as are the next two
COSTS = "costs"
LEASES = "claims"  # in an object store, instead of LOCK
LOCK = "claims.lock"
SHARD_SUFFIX = ".parquet"
SHARD_GLOB = f"*{SHARD_SUFFIX}"
SHARD_FILES = f"{SHARDS}/**/{SHARD_GLOB}"  # as a glob within a dump; `**` is any number of folders, or none
HUB_SHARD_FILES = f"{SHARDS}/{SHARD_GLOB}"  # where `*` matches slashes, too
FOLDER_SHARDS = 1000  # in a folder; hubs accept 10,000 files at most

_PLAN = "plan-"
PLAN_FILES = f"{_PLAN}*{SHARD_SUFFIX}"
_PART = "part-"
PARTIAL_FILES = (f"*/{_PART}*.partial", f"*/*/{_PART}*.partial")  # incomplete files of single shards, as such globs


class Key(StrEnum):
    """A key of a shard's Parquet metadata; values are text."""

    SCHEMA_VERSION = "bld.schema_version"
    IDENTITY = "bld.identity"  # JSON
    UNITS = "bld.units"
    DECODING = "bld.decoding"
    LEFT_OUT = "bld.left_out"  # JSON: documents left out, by name, with the reason
    TEACHER_TOKENS = "bld.teacher_tokens"
    COMPUTED_TOKENS = "bld.computed_tokens"
    SHARD_SHA256 = "bld.shard_sha256"  # of the shard's documents
    ENGINE = "bld.engine"
    LIBRARIES = "bld.libraries"  # JSON
    AUDIT = "bld.audit"  # JSON
    SHA256 = "bld.sha256"  # the seal, over the whole file
    VOCABULARY_SIZE = "bld.vocabulary_size"  # ids that the teacher has logits of, if a dump has alternatives of tokens
    TEXT_VERSION = "bld.text_version"  # of a shard of written text, as is the next
    COUNTED = "bld.counted"  # JSON
    COUNTED_OF = "bld.counted_of"  # in a run's token counts, which are sealed like shards


PART_NAMES = rf"{_PART}\d+\{SHARD_SUFFIX}"  # of shards, as a regular expression


def part_name(index: int) -> str:
    """Return the name, without suffix, of files that belong to one shard."""
    return f"{_PART}{index:05d}"


def part_index(name: str) -> int:
    """Return the number of the shard that a file of this name belongs to. Raises ValueError for any other name."""
    return int(name.removeprefix(_PART).split(".")[0])


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"{part_name(index)}{SHARD_SUFFIX}"


def part_folder(index: int) -> str:
    """Return the folder, within `shards` or `costs`, of files that belong to one shard; "" for the first thousand."""
    return f"{index // FOLDER_SHARDS:03d}" if index >= FOLDER_SHARDS else ""


def is_plan(name: str) -> bool:
    """Return whether a file of this name is a plan that is not in the manifest itself."""
    return name.startswith(_PLAN) and name.endswith(SHARD_SUFFIX)


def plan_name(sha256: str) -> str:
    """Return the name of the file of a plan that is not in the manifest itself, from the hash of its content."""
    return f"{_PLAN}{sha256[:16]}{SHARD_SUFFIX}"
