"""Comparison of a dump with its teacher: some documents are recomputed, with a control."""

import hashlib
import heapq
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config import Recipe
from pipeline.config.identity import identity_differences
from pipeline.config.loading import parse_recipe
from pipeline.runtime.format import count_of
from pipeline.runtime.plugins import is_own
from schemas import dump_files
from schemas.manifest import Manifest
from schemas.record import Record
from schemas.shard import read_shard, window_names
from schemas.storage.locations import Location
from stage1_teacher.dump.begun import as_dumped
from stage1_teacher.dump.identity import teacher_identity
from stage1_teacher.engines.batch_sizes import call_tokens
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.inputs.encoded_windows import EncodedWindow, batches
from stage1_teacher.targets import own_logprobs
from stage1_teacher.targets.distances import distances
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.own_alternatives import compare_alternatives
from stage1_teacher.targets.own_logprobs import window_of
from stage1_teacher.targets.resolved import ResolvedTeacher, load_tokenizer
from stage1_teacher.targets.teacher import Teacher

# Rounding to levels (1e-4) and other batches: the same teacher run twice in bfloat16 differs by about 1.5e-3 nats per
# token.
TOLERANCE_NATS = 0.02
TOLERANCE_CONTROLS = 3.0  # times the difference between two runs of the teacher


class Recomputed(NamedTuple):
    """Comparison of a stored record with two new runs of the teacher."""

    doc_id: str
    kl_nats: float  # KL(teacher, stored), mean per position
    total_variation: float
    control_nats: float  # KL between the teacher's two runs, in different batches, over all symbols
    control_total_variation: float
    own: own_logprobs.Comparison  # of stored token log-probabilities with the model's own
    alternatives: own_logprobs.Comparison | None  # of stored alternatives with the model's own distributions


def verify_teacher(path: Location, manifest: Manifest, num_documents: int) -> list[str]:
    """Return the faults where the teacher's targets for `num_documents` documents differ from the dump's.

    Prints how much they differ.
    """
    made_by = path / dump_files.RECIPE
    recipe = as_dumped(parse_recipe(made_by.read_text(encoding="utf-8"), str(made_by), is_stored=True), path, manifest)
    _refuse_own_file_of_dump(path, recipe.teacher.engine)
    named = load_tokenizer(recipe)
    faults = _other_teacher(path, manifest, recipe, named)
    if faults:
        return faults
    records = _sampled_records(path, manifest, num_documents)
    with open_teacher(recipe, *named) as teacher:
        results = recompute(records, recipe, teacher)
    if not results:
        return []
    worst_control = max(result.control_nats for result in results)
    limit = max(TOLERANCE_NATS, TOLERANCE_CONTROLS * worst_control)
    print(
        f"{path}: {count_of(len(results), 'record')} recomputed (documents whose ids hash lowest). Teacher to "
        f"stored targets: {_mean(results, 'kl_nats'):.2e} nats, "
        f"total variation {_mean(results, 'total_variation'):.2e} per position, "
        f"worst record {max(result.kl_nats for result in results):.2e} nats. "
        f"Control, the teacher run twice in other batches: {_mean(results, 'control_nats'):.2e} nats, total variation "
        f"{_mean(results, 'control_total_variation'):.2e}, worst record {worst_control:.2e} nats. "
        f"Limit: {limit:.2e} nats{_describe_own(results)}{_describe_alternatives(results)}"
    )
    return _own_faults(path, results) + [
        f"{path}, doc_id {result.doc_id!r}: the teacher's targets differ by {result.kl_nats:.3f} nats per position "
        f"from the stored ones (limit {limit:.3f}; two runs of the teacher differ by {result.control_nats:.3f})"
        for result in results
        if not result.kl_nats <= limit
    ]


def _refuse_own_file_of_dump(dump: Location, engine: str) -> None:
    """Raise ValueError for an engine file inside the dump: inspecting somebody's dump must not run their code."""
    if is_own(engine) and isinstance(dump, Path) and Path(engine).expanduser().resolve().is_relative_to(dump.resolve()):
        raise ValueError(
            f"{engine} lies in the dump that is to be verified, and would be run. Read it, move it out of the dump's "
            "folder, and give its new path in the dump's recipe"
        )


def _describe_own(results: list[Recomputed]) -> str:
    nats_N = np.concatenate([result.own.nats_N for result in results])
    if not len(nats_N):
        return ""
    return (
        f". Stored log-probabilities of {len(nats_N)} teacher tokens to the model's own: {nats_N.mean():.2e} nats "
        f"(half the mean square), worst record {max(result.own.nats for result in results):.2e}. "
        f"Limit: {max(result.own.limit_nats for result in results):.3g} nats"
    )


def _describe_alternatives(results: list[Recomputed]) -> str:
    found = [result.alternatives for result in results if result.alternatives is not None]
    if not found:
        return ""
    nats_N = np.concatenate([comparison.nats_N for comparison in found])
    return (
        f". Model's own distributions to the stored alternatives of {len(nats_N)} teacher tokens: {nats_N.mean():.2e} "
        f"nats per token, worst record {max(comparison.nats for comparison in found):.2e}. "
        f"Limit: {max(comparison.limit_nats for comparison in found):.3g} nats"
    )


def _own_faults(path: Location, results: list[Recomputed]) -> list[str]:
    return [
        f"{path}, doc_id {result.doc_id!r}: the stored alternatives of the teacher's tokens differ by "
        f"{result.alternatives.nats:.3g} nats per token (limit {result.alternatives.limit_nats:.3g}) from the model's "
        "own distributions: the dump does not hold the model's output. Make it again"
        for result in results
        if result.alternatives is not None and not result.alternatives.is_within_limit
    ] + [
        f"{path}, doc_id {result.doc_id!r}: the stored log-probabilities of the teacher's tokens differ by "
        f"{result.own.nats:.3g} nats (half the mean square; limit {result.own.limit_nats:.3g}) from the model's own: "
        "the dump does not hold the model's output. Make it again, with this release"
        for result in results
        if not result.own.is_within_limit
    ]


def _mean(results: list[Recomputed], field: str) -> float:
    return float(np.mean([getattr(result, field) for result in results]))


def _other_teacher(path: Location, manifest: Manifest, recipe: Recipe, named: ResolvedTeacher) -> list[str]:
    """Return where the teacher here is not the dump's, so that a difference would say nothing about the dump."""
    ours = teacher_identity(recipe, named, engine_name(recipe.teacher, recipe.placement), "")
    if ours["teacher"]["engine"] in manifest.accepted_engines:
        ours["teacher"]["engine"] = manifest.identity["teacher"]["engine"]
    return [
        f"{path}: cannot be compared with the teacher here, which is another one: {difference}"
        for difference in identity_differences({"teacher": manifest.identity["teacher"]}, {"teacher": ours["teacher"]})
    ]


def _sampled_records(path: Location, manifest: Manifest, num_documents: int) -> list[Record]:
    """Return the records of the documents whose ids hash lowest: the same each time, from all over the dump."""
    ids = {doc_id for shard in manifest.shards for doc_id, _ in window_names(shard.path(path))}
    chosen = set(heapq.nsmallest(num_documents, ids, key=lambda doc_id: hashlib.sha256(doc_id.encode()).digest()))
    records = (record for shard in manifest.shards for record in read_shard(shard.path(path)))
    return [record for record in records if record.doc_id in chosen and record.segments]


def recompute(records: list[Record], recipe: Recipe, teacher: Teacher) -> list[Recomputed]:
    """Recompute each record alone, and as a control also in batches, as a dump does."""
    windows = [window_of(record, teacher) for record in records]
    batched = [
        targets for batch in batches(windows, call_tokens(recipe.placement)) for targets in _targets(batch, teacher)
    ]
    results = []
    for record, window, control_PV in zip(records, windows, batched, strict=True):
        [alone_PV] = _targets([window], teacher)
        stored = distances(record, alone_PV)
        results.append(
            Recomputed(
                record.doc_id,
                float(stored.kl_P.mean()),
                float(stored.total_variation_P.mean()),
                *_apart(alone_PV, control_PV),
                own=own_logprobs.compare(record, window, teacher),
                alternatives=compare_alternatives(record, window, teacher),
            )
        )
    return results


def _apart(one_PV: np.ndarray, other_PV: np.ndarray) -> tuple[float, float]:
    """Return (KL in nats, total variation) of one run to another, mean per position, over all symbols."""
    ratio_PV = np.divide(one_PV, np.maximum(other_PV, 1e-35), out=np.ones_like(one_PV), where=one_PV > 0)
    kl = (one_PV * np.log(ratio_PV)).sum(axis=1).mean()
    return float(kl), float(np.abs(one_PV - other_PV).sum(axis=1).mean() / 2)


def _targets(windows: list[EncodedWindow], teacher: Teacher) -> list[np.ndarray]:
    """Compute the targets of each window's supervised positions, P x V."""
    targets = iter(teacher.targets(windows, teacher.run_engine(windows)))
    return [
        np.concatenate(
            [
                of_span.probs_PV[first:last]
                for span, of_span in zip(window.spans, targets, strict=False)
                for first, last in span.kept
            ]
        )
        for window in windows
    ]
