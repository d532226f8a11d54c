"""Calibration of the forecast: a minute of dumping, which shows what the whole dump will take.

A random sample of the corpus goes through the same engine, covering and writer, into a folder that is then deleted.
"""

import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.config.identity import added_values
from pipeline.corpus.documents import Corpus, Document
from pipeline.planning.estimates import MIN_UNITS as MIN_PARTS
from pipeline.planning.forecast import Calibration, EncodedDocument, SamplePart, TrialFile
from schemas import dump_files
from schemas.dump_files import Key
from schemas.manifest import ShardPlan
from schemas.record import RecordText
from schemas.shard import commit_shard, read_shard, shard_metadata, to_table
from schemas.storage.locations import open_parquet
from stage1_teacher.calibration.corpus_sample import survey
from stage1_teacher.dump import audit, shard_cost
from stage1_teacher.dump.shard_writer import encode, make_shards
from stage1_teacher.engines.base import ListingEngine
from stage1_teacher.engines.batch_sizes import call_tokens
from stage1_teacher.inputs.fit_windows import with_fitting_windows
from stage1_teacher.targets.opening import open_teacher
from stage1_teacher.targets.resolved import load_tokenizer
from stage1_teacher.targets.teacher import Teacher

# Parts that the time is divided into: fewer say little about how they vary; more are too small to resemble batches.
NUM_PARTS = 12
FIRST_BYTES = 4096  # dumped twice beforehand: to compile what compiles on first use, and to find the size of a part
BYTES_PER_TOKEN = 4
NUM_FIRST = 64  # documents from which short ones are chosen for that
ENCODE_SHARE = 0.1  # of the time, for documents that are only encoded
NUM_AUDITED = 3


def calibrate(recipe: Recipe, seconds: float = 60.0, corpus_bytes: int | None = None) -> Calibration:
    """Dump a sample for about `seconds`, excluding the engine's start.

    Args:
        corpus_bytes: bytes of text in the whole corpus, if reading all of it would take too long.
    Raises:
        ValueError: the recipe cannot be dumped, or its corpus is too small to sample.
    """
    named = load_tokenizer(recipe)
    recipe = with_fitting_windows(recipe, named.model)
    surveyed = survey(Corpus(recipe.corpus, recipe.dump.arithmetic_used), int(recipe.dump.shard_bytes), corpus_bytes)
    num_audited = min(recipe.dump.audit_documents, audit.affordable(surveyed.shape.num_bytes))
    started = time.monotonic()
    with open_teacher(recipe, *named, branches=num_audited > 0) as teacher:
        loaded = time.monotonic() - started
        with tempfile.TemporaryDirectory() as scratch:
            cold, again = dump_first(surveyed.sample, teacher, recipe, Path(scratch))
            groups = grouped(surveyed.sample, part_bytes(again, recipe, seconds))
            parts = list(dump_parts(groups, teacher, recipe, Path(scratch) / "parts", seconds))
            paths = part_paths(Path(scratch) / "parts")
            files = joined(paths, [part.text_bytes for part in parts], Path(scratch) / "joined.parquet", recipe)
        documents, records = encoded(surveyed.sample, teacher, seconds * ENCODE_SHARE)
        return Calibration(
            shape=surveyed.shape,
            documents=documents,
            parts=parts,
            files=files,
            load_seconds=loaded,
            warm_seconds=max(0.0, cold.seconds - again.seconds),
            read_seconds=surveyed.seconds,
            audit_seconds=seconds_of_audit(surveyed.sample, teacher, num_audited),
            devices=shard_cost.devices(recipe),
            num_devices=shard_cost.num_devices(recipe),
            records=records,
        )


def dump_first(
    sample: Sequence[Document], teacher: Teacher, recipe: Recipe, scratch: Path
) -> tuple[SamplePart, SamplePart]:
    """Dump a few short documents twice: before anything has been used, and after."""
    first = next(grouped(sorted(sample[:NUM_FIRST], key=lambda document: len(document.text)), FIRST_BYTES))
    [cold] = dump_parts([first], teacher, recipe, scratch / "cold", math.inf)
    [again] = dump_parts([first], teacher, recipe, scratch / "again", math.inf)
    return cold, again


def part_bytes(first: SamplePart, recipe: Recipe, seconds: float) -> int:
    """Choose a part's bytes of text so that `NUM_PARTS` take `seconds`: at most a batch, at least those of `first`."""
    share = first.text_bytes / first.seconds * seconds / NUM_PARTS
    return int(max(first.text_bytes, min(share, call_tokens(recipe.placement) * BYTES_PER_TOKEN)))


def grouped(documents: Sequence[Document], part_bytes: int) -> Iterator[list[Document]]:
    """Yield documents in order, in groups of at most `part_bytes` of text, but at least one document."""
    group: list[Document] = []
    for document in documents:
        if group and sum(len(d.text) for d in group) + len(document.text) > part_bytes:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def dump_parts(
    groups: Iterable[list[Document]], teacher: Teacher, recipe: Recipe, folder: Path, seconds: float
) -> Iterator[SamplePart]:
    """Dump each group into a shard of its own, as `bld teacher` would, until the time is over; yield their figures."""
    (folder / dump_files.SHARDS).mkdir(parents=True)
    plans: list[ShardPlan] = []
    until = time.monotonic() + seconds

    def planned() -> Iterator[tuple[ShardPlan, list[Document]]]:
        for index, group in enumerate(groups):
            if index >= MIN_PARTS and time.monotonic() > until:
                return
            num_bytes = sum(len(document.text) for document in group)
            plans.append(
                ShardPlan(index=index, first_document=0, num_documents=len(group), num_bytes=num_bytes, sha256="")
            )
            yield plans[-1], group

    made = (
        made for made in make_shards(planned(), teacher, recipe, trial_identity(recipe), folder) if made.stored_bytes
    )
    for number, _ in enumerate(made):
        yield read_part(plans[number], folder)


def trial_identity(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the columns of trial shards and how their numbers are stored."""
    return {"coding": recipe.dump.coding, **added_values(recipe.dump)}


def read_part(plan: ShardPlan, folder: Path) -> SamplePart:
    """Read the figures of a trial shard from its footer, and its cost."""
    path = plan.path(folder)
    with open_parquet(path) as file:
        metadata = shard_metadata(path, file.schema_arrow)
    cost = shard_cost.read_cost(folder, plan)
    assert cost is not None  # the shard was made here
    return SamplePart(
        text_bytes=plan.num_bytes,
        teacher_tokens=int(metadata[Key.TEACHER_TOKENS]),
        computed_tokens=int(metadata[Key.COMPUTED_TOKENS]),
        stored_bytes=path.stat().st_size,
        seconds=cost.seconds,
    )


def part_paths(folder: Path) -> list[Path]:
    return sorted((folder / dump_files.SHARDS).glob(dump_files.SHARD_GLOB))


def joined(paths: Sequence[Path], text_bytes: Sequence[int], scratch: Path, recipe: Recipe) -> list[TrialFile]:
    """Join the parts' records into files as large as the dump's shards will be, or one if they are less than a shard.

    Args:
        text_bytes: of each part.
        scratch: path of a temporary file.
    """
    max_bytes = max(int(recipe.dump.shard_bytes), max(text_bytes))
    files: list[TrialFile] = []
    first = 0
    while first < len(paths):
        last = first + 1
        while last < len(paths) and sum(text_bytes[first : last + 1]) <= max_bytes:
            last += 1
        if not files or last < len(paths):  # a remainder after other files is smaller than a shard, and left out
            files.append(_joined(paths[first:last], sum(text_bytes[first:last]), scratch, recipe))
        first = last
    return files


def _joined(paths: Sequence[Path], text_bytes: int, scratch: Path, recipe: Recipe) -> TrialFile:
    records = list(chain.from_iterable(map(read_shard, paths)))
    middle = len(records) // 2
    sizes = [
        commit_shard(to_table(some, trial_identity(recipe)), scratch, recipe.dump.zstd_level)
        for some in (records, records[:middle], records[middle:])
    ]
    return TrialFile(text_bytes, sizes[0], sizes[1] + sizes[2])


def encoded(
    sample: Sequence[Document], teacher: Teacher, seconds: float
) -> tuple[list[EncodedDocument], list[RecordText]]:
    """Encode documents of the sample, as many as the time allows; return their tokens and their future records.

    A document that must be left out has no record.
    """
    until = time.monotonic() + seconds
    documents: list[EncodedDocument] = []
    records: list[RecordText] = []
    for document in sample:
        if len(documents) >= MIN_PARTS and time.monotonic() > until:
            break
        windows = list(encode([document], teacher, {}))
        documents.append(EncodedDocument(len(document.text), sum(len(teacher.prompt(window)) for window in windows)))
        for window in windows:
            records.append(
                RecordText(
                    window.doc_id,
                    window.bounds.start,
                    window.text,
                    window.segments,
                    window.roles,
                    window.lengths,
                    conversation=window.conversation,
                )
            )
    return documents, records


def seconds_of_audit(sample: Sequence[Document], teacher: Teacher, num_documents: int) -> float:
    """Estimate the seconds of auditing `num_documents`: the first takes longer; 0 for a served teacher."""
    if not num_documents or isinstance(teacher.engine, ListingEngine):
        return 0.0
    windows = [window for window in encode(sample[:NUM_AUDITED], teacher, {}) if window.bounds.start == 0]
    seconds = []
    for window in windows:
        started = time.monotonic()
        audit.compute_reference(teacher, window)
        seconds.append(time.monotonic() - started)
    later = seconds[1:] or seconds
    return seconds[0] + (num_documents - 1) * sum(later) / len(later) if seconds else 0.0
