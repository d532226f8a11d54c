"""`bld verify`: is every shard there, byte for byte, and true to schema and plan; and does the teacher still say the same."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.chat_template import ASSISTANT
from pipeline.config import Recipe
from pipeline.recipe import parse_recipe
from schemas.manifest import Manifest, ShardPlan, identity_differences, read_json, shard_identity
from schemas.seal import check_seal
from schemas.shard import SHARD_SCHEMA, Record, read_shard
from schemas.store import Location, StoreError, names, open_parquet
from stage1_teacher.chat_pieces import chat_piece
from stage1_teacher.fidelity import distances
from stage1_teacher.identity import engine_name, teacher_identity
from stage1_teacher.pieces import Piece, batches, plain_piece
from stage1_teacher.summary import summarise
from stage1_teacher.teacher import Named, Teacher, load_tokenizer, open_teacher
from stage1_teacher.windows import Window

# Rounding to levels (1e-4) and other batches: the same teacher run twice in bfloat16 differs by about 1.5e-3 nats per token.
TOLERANCE_NATS = 0.02
TOLERANCE_CONTROLS = 3.0  # times what the teacher differs by from itself


def verify_dump(path: Location, against_teacher: int = 0) -> list[str]:
    """Faults found, each naming its shard and record; an empty list for a good dump.

    Args:
        against_teacher: recompute this many documents with the teacher and report where the targets differ.
    """
    manifest = Manifest.load(path)
    faults: list[str] = []
    for shard in manifest.shards:
        faults += verify_shard(shard.path(path), shard, manifest)
    planned = {shard.path(path).name for shard in manifest.shards}
    for other in sorted(names(path / "shards") - planned):
        if other.endswith(".parquet"):
            faults.append(
                f"{path / 'shards' / other}: not in the plan (manifest.json); it belongs to another dump: move it away"
            )
    faults += _summary_faults(path, manifest, bool(faults))
    if against_teacher and not faults:
        faults += _verify_teacher(path, manifest, against_teacher)
    return faults


def verify_shard(path: Location, shard: ShardPlan, manifest: Manifest) -> list[str]:
    """Of a damaged shard only that: what cannot be trusted is not read."""
    if not path.exists():
        return [f"{path}: missing; run `bld teacher` again to make it"]
    again = "delete it and run `bld teacher` again"
    try:
        check_seal(path)
        with open_parquet(path) as file:
            faults = _schema_faults(file.schema_arrow)
            metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        faults = faults or _plan_faults(metadata, shard, manifest) + list(_record_faults(path, metadata, shard))
    except StoreError:
        raise  # says nothing about the shard
    except PermissionError as error:
        return [f"{path}: cannot be read ({error.strerror}); give this user the right to"]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        text = str(error).removeprefix(f"{path} ")
        return [f"{path}: {text if isinstance(error, ValueError) else f'cannot be read ({error!r})'}; {again}"]
    return [f"{path}{fault}" for fault in faults]


def _schema_faults(schema: pa.Schema) -> list[str]:
    """Other columns than the format's; metadata apart."""
    ours = {field.name: (field.type, field.nullable) for field in SHARD_SCHEMA}
    theirs = {field.name: (field.type, field.nullable) for field in schema}
    return [
        f": column {name} is {theirs.get(name)}, the format says {ours.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _plan_faults(metadata: dict[str, str], shard: ShardPlan, manifest: Manifest) -> list[str]:
    """Whether it is this dump's shard, and was made of the documents that the plan gives it."""
    faults = [
        f": identity differs from the manifest's: {difference}"
        for difference in identity_differences(json.loads(metadata["bld.identity"]), shard_identity(manifest.identity))
    ]
    if metadata["bld.shard_sha256"] != shard.sha256:
        faults.append(f": made of other documents than the plan's ({shard.first_document} and on)")
    engines = {manifest.identity.get("teacher", {}).get("engine"), *manifest.accepted_engines}
    if metadata["bld.engine"] not in engines:
        faults.append(f": made by {metadata['bld.engine']}, which the manifest does not accept")
    return faults


def _record_faults(path: Location, metadata: dict[str, str], shard: ShardPlan) -> Iterator[str]:
    """Of each record, of the windows of a document together, and of the shard's counts."""
    num_documents, num_bytes = 0, 0
    open_id: str | None = None  # of a document whose last window has not come yet
    done = 0  # bytes of it that are supervised so far
    heard = 0  # of a chat, bytes that its windows held so far
    for row, record in enumerate(read_shard(path, checked=False)):
        where = f", record {row} (doc_id {record.doc_id!r}): "
        faults = [*record.faults(), *_share_faults(record), *_chat_faults(record)]
        yield from (where + fault for fault in faults)
        if faults:
            continue
        if open_id not in (None, record.doc_id):
            yield f", record {row - 1} (doc_id {open_id!r}): the document's last window is missing"
        if record.message_roles:
            heard = heard if record.window_start else 0
            num_documents += not record.window_start
            num_bytes += sum(len(part) for part in _said(record) if part.stop > heard)
            heard, open_id = record.window_start + len(record.document), None
            continue
        done = done if open_id == record.doc_id else 0
        for segment in record.segments:
            start = record.window_start + segment.start
            if start != done:
                yield f"{where}supervises from byte {start} on, what is before it ends at {done}"
            done = start + segment.length
            num_bytes += segment.length
        ends = bool(record.segments) and record.segments[-1].has_end
        num_documents += ends
        open_id = None if ends else record.doc_id
    if open_id is not None:
        yield f" (doc_id {open_id!r}): the document's last window is missing"
    left_out = json.loads(metadata["bld.left_out"])
    if num_documents + len(left_out) != shard.num_documents:
        yield f": {num_documents} documents and {len(left_out)} left out, {shard.num_documents} are planned"
    if num_bytes != shard.num_bytes and not left_out:
        yield f": {num_bytes} bytes to supervise, {shard.num_bytes} are planned"


def _said(record: Record) -> list[range]:
    """Bytes of the whole chat that are the assistant's words, message by message."""
    ends = list(accumulate(record.message_lengths, initial=record.window_start))
    spans = zip(record.message_roles, pairwise(ends), strict=True)
    return [range(start, end) for role, (start, end) in spans if role == ASSISTANT]


def _chat_faults(record: Record) -> list[str]:
    """Whether a chat's segments lie in what the assistant says, one after another."""
    if not record.message_roles:
        return []
    spans = [(record.window_start + s.start, record.window_start + s.start + s.length) for s in record.segments]
    faults = [
        f"supervises bytes {start} to {end}, which are not what the assistant says"
        for start, end in spans
        if not any(part.start <= start and end <= part.stop for part in _said(record))
    ]
    if any(one[1] > other[0] for one, other in pairwise(spans)):
        faults.append("segments overlap, or are out of order")
    return faults


def _share_faults(record: Record) -> list[str]:
    shares = {"dropped": record.dropped, "token_end": record.token_end, "doubt": record.doubt}
    return [
        f"{name} holds values outside 0..1"
        for name, value_P in shares.items()
        if not bool(((value_P >= 0) & (value_P <= 1)).all())  # false for nan
    ]


def _summary_faults(path: Location, manifest: Manifest, damaged: bool) -> list[str]:
    """Whether the summary is that of these shards; not asked where they are damaged."""
    summary = path / "summary.json"
    if not summary.exists():
        return [f"{summary}: missing; the dump is not complete: run `bld teacher` again"]
    if damaged:
        return []
    try:
        stored = read_json(summary, "shards")
    except ValueError as error:
        return [str(error)]
    counted = summarise(path, manifest)
    # What a merged dump was made of, and what a dump took, its shards do not tell.
    for values in (stored, counted):
        for key in ("merged_from", "cost"):
            values.pop(key, None)
    differences = identity_differences(_by_name(stored), _by_name(counted))
    return [
        f"{summary}: is not that of these shards ({difference}); delete it and run `bld teacher` again"
        for difference in differences
    ]


def _by_name(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"shards": {shard["name"]: shard for shard in summary["shards"]}}


class Recomputed(NamedTuple):
    """A record of the dump beside what the teacher says now, twice."""

    doc_id: str
    kl_nats: float  # KL(teacher, stored), mean per position
    total_variation: float
    control_nats: float  # of the teacher to itself in another batch: |KL|, over the same classes
    control_total_variation: float


def _verify_teacher(path: Location, manifest: Manifest, num_documents: int) -> list[str]:
    made_by = path / "recipe.yaml"
    recipe = parse_recipe(made_by.read_text(encoding="utf-8"), str(made_by))
    named = load_tokenizer(recipe)
    faults = _other_teacher(path, manifest, recipe, named)
    if faults:
        return faults
    records = _sampled_records(path, manifest, num_documents)
    teacher = open_teacher(recipe, *named)
    found = recompute(records, recipe, teacher)
    teacher.engine.close()
    if not found:
        return []
    worst_control = max(result.control_nats for result in found)
    limit = max(TOLERANCE_NATS, TOLERANCE_CONTROLS * worst_control)
    print(
        f"{path}: {len(found)} records recomputed (documents whose ids hash lowest). Teacher to stored targets: "
        f"{_mean(found, 'kl_nats'):.2e} nats, total variation {_mean(found, 'total_variation'):.2e} per position, "
        f"worst record {max(result.kl_nats for result in found):.2e} nats. "
        f"Control, the teacher run twice in other batches: {_mean(found, 'control_nats'):.2e} nats, total variation "
        f"{_mean(found, 'control_total_variation'):.2e}, worst record {worst_control:.2e} nats. Limit: {limit:.2e} nats"
    )
    return [
        f"{path}, doc_id {result.doc_id!r}: the teacher's targets are {result.kl_nats:.3f} nats per position from what is stored "
        f"(limit {limit:.3f}; run twice it differs by {result.control_nats:.3f})"
        for result in found
        if not result.kl_nats <= limit
    ]


def _mean(found: list[Recomputed], field: str) -> float:
    return float(np.mean([getattr(result, field) for result in found]))


def _other_teacher(path: Location, manifest: Manifest, recipe: Recipe, named: Named) -> list[str]:
    """Where the teacher on this machine is not the dump's, so that a difference would say nothing about the dump."""
    ours = teacher_identity(recipe, named, engine_name(recipe), "")
    if ours["teacher"]["engine"] in manifest.accepted_engines:
        ours["teacher"]["engine"] = manifest.identity["teacher"]["engine"]
    return [
        f"{path}: cannot be compared with the teacher here, which is another one: {difference}"
        for difference in identity_differences(manifest.identity["teacher"], ours["teacher"])
    ]


def _sampled_records(path: Location, manifest: Manifest, num_documents: int) -> list[Record]:
    """The records of the documents whose ids hash lowest: the same ones each time, from all over the dump."""
    ids: set[str] = set()
    for shard in manifest.shards:
        with open_parquet(shard.path(path)) as file:
            ids.update(file.read(columns=["doc_id"])["doc_id"].to_pylist())
    chosen = set(heapq.nsmallest(num_documents, ids, key=lambda doc_id: hashlib.sha256(doc_id.encode()).digest()))
    return [record for shard in manifest.shards for record in read_shard(shard.path(path)) if record.doc_id in chosen]


def recompute(records: list[Record], recipe: Recipe, teacher: Teacher) -> list[Recomputed]:
    """Ask the teacher for each record alone, and for the control in batches as a dump makes them."""
    pieces = [_piece(record, teacher) for record in records]
    batched = [
        targets for batch in batches(pieces, recipe.placement.batch_tokens) for targets in _targets(batch, teacher)
    ]
    found = []
    for record, piece, control_PV in zip(records, pieces, batched, strict=True):
        [alone_PV] = _targets([piece], teacher)
        stored = distances(record, alone_PV)
        found.append(
            Recomputed(
                record.doc_id,
                float(stored.kl_P.mean()),
                float(stored.total_variation_P.mean()),
                *_apart(alone_PV, control_PV),
            )
        )
    return found


def _apart(one_PV: np.ndarray, other_PV: np.ndarray) -> tuple[float, float]:
    """(KL in nats, total variation), mean per position, of one run to another, over all symbols."""
    ratio_PV = np.divide(one_PV, np.maximum(other_PV, 1e-35), out=np.ones_like(one_PV), where=one_PV > 0)
    kl = (one_PV * np.log(ratio_PV)).sum(axis=1).mean()
    return float(kl), float(np.abs(one_PV - other_PV).sum(axis=1).mean() / 2)


def _targets(pieces: list[Piece], teacher: Teacher) -> list[np.ndarray]:
    """Of each piece, position by position, what is supervised."""
    found = iter(teacher.targets(pieces, teacher.ask(pieces)))
    return [
        np.concatenate([next(found).probs_PV[s.skipped : s.skipped + s.segment.num_positions] for s in piece.stretches])
        for piece in pieces
    ]


def _piece(record: Record, teacher: Teacher) -> Piece:
    """What a record was made of. Raises ValueError for a chat that this teacher's template does not render."""
    if record.message_roles:
        assert teacher.chat is not None  # the recipe says that the corpus holds chats
        piece = chat_piece(record.doc_id, record.messages, teacher.chat.encode(record.messages), teacher.ends)
        # A window does not supervise its first turns.
        return replace(piece, stretches=tuple(s for s in piece.stretches if s.segment in record.segments))
    [segment] = record.segments
    end = record.window_start + len(record.document)
    window = Window(record.window_start, end, record.window_start + segment.start, segment.has_end)
    tokens = teacher.tokenizer.encode(record.document)
    return plain_piece(record.doc_id, window, record.document, tokens, teacher.tokenizer.prefix)
