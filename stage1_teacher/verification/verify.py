"""`bld verify`: checks that every shard exists, is intact and follows schema and plan.

On request it also checks that the teacher still gives the same targets.
"""

import json
from typing import Any

import pyarrow as pa

from pipeline.config.identity import identity_differences
from schemas import VersionError, dump_files
from schemas.columns import describe_field, differ
from schemas.dump_files import Key
from schemas.file_seal import check_seal
from schemas.manifest import Manifest, ShardPlan, read_json, shard_identity, with_accepted_engine
from schemas.shard import shard_metadata, shard_reader
from schemas.storage.locations import Location, StoreError, names_below, open_parquet
from schemas.token_vocabulary import read_vocabulary
from stage1_teacher.dump.summary import summarise
from stage1_teacher.verification.verify_records import faults_of_records
from stage1_teacher.verification.verify_tokens import Vocabulary


def verify_dump(path: Location, against_teacher: int = 0) -> list[str]:
    """Return the faults found, each naming its shard and record; an empty list for a good dump.

    Args:
        against_teacher: recompute this many documents with the teacher and report where the targets differ.
    """
    manifest = Manifest.load(path)
    faults: list[str] = []
    vocabulary: Vocabulary | None = None
    if manifest.has_tokens:
        try:
            vocabulary = read_vocabulary(path)
        except ValueError as error:
            faults.append(str(error))
    for shard in manifest.shards:
        faults += verify_shard(shard.path(path), shard, manifest, vocabulary)
    planned = {shard.file for shard in manifest.shards}
    for other in sorted(names_below(path / dump_files.SHARDS) - planned):
        if other.endswith(dump_files.SHARD_SUFFIX):
            where = path / dump_files.SHARDS / other
            faults.append(f"{where}: not in the plan (manifest.json); it belongs to another dump: move it away")
    faults += _summary_faults(path, manifest, bool(faults))
    if against_teacher and not faults:
        # Takes seconds to import, because it can open a teacher.
        from stage1_teacher.verification.verify_teacher import verify_teacher

        faults += verify_teacher(path, manifest, against_teacher)
    return faults


def verify_shard(
    path: Location, shard: ShardPlan, manifest: Manifest, vocabulary: Vocabulary | None = None
) -> list[str]:
    """Return the faults of a shard; for a damaged one only the damage, because its content cannot be trusted.

    Args:
        vocabulary: bytes of the teacher's tokens, with which alternatives are checked.
    """
    if not path.exists():
        return [f"{path}: missing; run `bld teacher` again to make it"]
    remedy = "delete it and run `bld teacher` again"
    try:
        check_seal(path)
        with open_parquet(path) as file:
            metadata = shard_metadata(path, file.schema_arrow)
            expected = shard_reader(path, file.schema_arrow.metadata).shard_schema(json.loads(metadata[Key.IDENTITY]))
            faults = _schema_faults(file.schema_arrow, expected)
        faults = faults or [
            *_plan_faults(metadata, shard, manifest),
            *faults_of_records(path, metadata, shard, vocabulary),
        ]
    except StoreError:
        raise  # says nothing about the shard
    except VersionError as error:
        return [str(error)]  # not damaged: a newer release reads it
    except PermissionError as error:
        return [f"{path}: cannot be read ({error.strerror}); give this user permission to read it"]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        text = str(error).removeprefix(f"{path} ")
        return [f"{path}: {text if isinstance(error, ValueError) else f'cannot be read ({error!r})'}; {remedy}"]
    return [f"{path}{fault}" for fault in faults]


def _schema_faults(schema: pa.Schema, expected: pa.Schema) -> list[str]:
    """Return columns that differ from the format's; metadata is not compared."""
    ours, theirs = ({field.name: field for field in fields} for fields in (expected, schema))
    faults = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            faults.append(f": column {name} ({describe_field(theirs[name])}) is not one of this dump's format")
        elif name not in theirs:
            faults.append(f": column {name} is missing")
        elif differ(theirs[name], ours[name]):
            faults.append(
                f": column {name} is {describe_field(theirs[name])}, the format says {describe_field(ours[name])}"
            )
    return faults


def _plan_faults(metadata: dict[str, str], shard: ShardPlan, manifest: Manifest) -> list[str]:
    """Return the signs that a shard is not this dump's, or was made from other documents than planned."""
    theirs, ours = json.loads(metadata[Key.IDENTITY]), shard_identity(manifest.identity)
    if "teacher" in theirs:  # a part of a merged dump, which an accepted engine may have begun
        theirs = with_accepted_engine(theirs, ours, manifest.accepted_engines)
    faults = [
        f": identity differs from the manifest's: {difference}" for difference in identity_differences(theirs, ours)
    ]
    if metadata[Key.SHARD_SHA256] != shard.sha256:
        faults.append(f": made from other documents than planned (from document {shard.first_document} on)")
    engines = {manifest.identity.get("teacher", {}).get("engine"), *manifest.accepted_engines}
    if metadata[Key.ENGINE] not in engines:
        faults.append(f": made by {metadata[Key.ENGINE]}, which the manifest does not accept")
    return faults


def _summary_faults(path: Location, manifest: Manifest, damaged: bool) -> list[str]:
    """Return where the summary differs from these shards; nothing if they are damaged."""
    summary = path / dump_files.SUMMARY
    if not summary.exists():
        return [f"{summary}: missing; the dump is not complete: run `bld teacher` again"]
    if damaged:
        return []
    try:
        stored = read_json(summary, "shards")
    except ValueError as error:
        return [str(error)]
    counted = summarise(path, manifest)
    # A dump's shards do not tell what it was merged from, or what it cost.
    for values in (stored, counted):
        for key in ("merged_from", "cost"):
            values.pop(key, None)
    differences = identity_differences(_by_name(stored), _by_name(counted))
    return [
        f"{summary}: does not match these shards ({difference}); delete it and run `bld teacher` again"
        for difference in differences
    ]


def _by_name(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"shards": {shard["name"]: shard for shard in summary["shards"]}}
