"""`bld verify`: is every shard there, whole and true to the schema; and does the teacher still say the same."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import Recipe
from pipeline.corpus import Document
from pipeline.recipe import load_recipe
from schemas.manifest import Manifest
from schemas.shard import Record, read_shard


def verify_dump(path: Path, against_teacher: int = 0) -> list[str]:
    """Faults found, each naming its shard and record; an empty list for a good dump.

    Args:
        against_teacher: recompute this many documents with the teacher and report where the targets differ.
    """
    manifest = Manifest.load(path)
    faults: list[str] = []
    for shard in manifest.shards:
        faults += verify_shard(shard.path(path))
    faults += _verify_summary(path)
    if against_teacher and not faults:
        faults += _verify_teacher(path, manifest, against_teacher)
    return faults


def verify_shard(path: Path) -> list[str]:
    if not path.exists():
        return [f"{path}: missing; run `bld teacher` again to make it"]
    faults: list[str] = []
    try:
        for row, record in enumerate(read_shard(path)):
            faults += [f"{path}, record {row} (doc_id {record.doc_id!r}): {fault}" for fault in record.faults()]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        faults.append(f"{path}: cannot be read ({error}); delete it and run `bld teacher` again")
    return faults


def _verify_summary(path: Path) -> list[str]:
    summary = path / "summary.json"
    if not summary.exists():
        return [f"{summary}: missing; the dump is not complete: run `bld teacher` again"]
    faults = []
    for shard in json.loads(summary.read_text(encoding="utf-8"))["shards"]:
        file = path / "shards" / Path(shard["name"]).name
        if not file.exists():
            continue  # already named
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != shard["sha256"]:
            faults.append(
                f"{file}: sha256 {found[:12]}.. differs from the summary's {shard['sha256'][:12]}..; delete it and dump again"
            )
    return faults


def _verify_teacher(path: Path, manifest: Manifest, num_documents: int) -> list[str]:
    from stage1_teacher.teacher import load_tokenizer, open_teacher

    recipe = load_recipe(str(path / "recipe.yaml"), [])
    teacher = open_teacher(recipe, *load_tokenizer(recipe))
    divergences: list[float] = []
    for shard in manifest.shards:
        for record in read_shard(shard.path(path)):
            if len(divergences) == num_documents:
                break
            divergences.append(_divergence(record, recipe, teacher))
    teacher.engine.close()
    print(
        f"{path}: {len(divergences)} records recomputed; mean divergence {np.mean(divergences):.2e} nats per position"
    )
    worst = max(divergences, default=0.0)
    # The same teacher run twice in bfloat16 with other batches differs by about 1.5e-3 nats per token.
    return (
        []
        if worst < 0.02
        else [f"{path}: a recomputed record differs by {worst:.3f} nats per position from what is stored"]
    )


def _divergence(record: Record, recipe: Recipe, teacher: object) -> float:
    """Mean over positions of |log p - log p'| of the realised symbol, nats."""
    from stage1_teacher.dump import make_records
    from stage1_teacher.pieces import Piece
    from stage1_teacher.teacher import Teacher
    from stage1_teacher.windows import Window

    assert isinstance(teacher, Teacher)
    document = Document(doc_id=record.doc_id, text=record.document, messages=None)
    segment = record.segments[0]
    window = Window(
        record.window_start,
        record.window_start + len(record.document),
        record.window_start + segment.start,
        segment.has_end,
    )
    piece = Piece(document.doc_id, window, document.text, teacher.tokenizer.encode(document.text))
    [again] = make_records([piece], teacher.ask([piece]), teacher, recipe.dump)
    return float(np.abs(realised_logprobs(record) - realised_logprobs(again)).mean())


def realised_logprobs(record: Record) -> np.ndarray:
    """P, float64 nats: the stored log-probability of the symbol that the document really has."""
    position_E = np.repeat(np.arange(record.num_positions), record.entry_counts)
    is_realised_E = record.symbols == record.realised()[position_E]
    return record.logprobs[is_realised_E].astype(np.float64)
