"""Planning of a dump, once: the first process reads the corpus, a resume and other processes go by what it noted."""

import time
from collections.abc import Callable, Set
from typing import NamedTuple

from pipeline.config import Recipe
from pipeline.config.loading import save_recipe
from pipeline.corpus.documents import Corpus
from pipeline.corpus.left_out import tell_left_out
from pipeline.corpus.parallel import found_in_parallel, is_large
from pipeline.runtime import log
from schemas import dump_files
from schemas.manifest import Manifest, ShardPlan
from schemas.storage.atomic import committed
from schemas.storage.locations import location
from schemas.token_vocabulary import write_vocabulary
from stage1_teacher.coordination.shard_claims import Claims
from stage1_teacher.dump import audit, shard_plan
from stage1_teacher.dump.begun import warn_other_libraries
from stage1_teacher.dump.extend import extend_dump
from stage1_teacher.dump.identity import teacher_identity
from stage1_teacher.dump.input_files import plan_sha256
from stage1_teacher.dump.job import DumpJob
from stage1_teacher.dump.places import Note, PlaceNotes, Places
from stage1_teacher.engines.registry import engine_name
from stage1_teacher.targets.resolved import ResolvedTeacher

_SAY_SECONDS = 60.0


class Prepared(NamedTuple):
    """A planned dump.

    Attributes:
        audited: ids of the documents to audit.
        first_places: place of the first row left out, by reason.
        is_noted: whether the dump holds a note of the places.
    """

    manifest: Manifest
    audited: Set[str]
    places: Places
    first_places: dict[str, str]
    is_noted: bool = False


def prepare(
    recipe: Recipe, corpus: Corpus, teacher: ResolvedTeacher, renew: Callable[[], None] = lambda: None
) -> Prepared:
    """Plan the dump, as a pure function of corpus and recipe.

    Args:
        renew: called now and then, to keep a claim alive.
    """
    # First, so that a server with another model fails before the corpus is read.
    engine = engine_name(recipe.teacher, recipe.placement)
    sample, notes = audit.Sample(recipe.dump.audit_documents), PlaceNotes()
    shards: list[ShardPlan] = []
    said = time.monotonic()
    found = found_in_parallel(corpus) if is_large(corpus.source) else corpus.found()
    documents = sample.passing(notes.passing(corpus.placed(found)))
    for shard in shard_plan.plan_shards(documents, int(recipe.dump.shard_bytes)):
        shards.append(shard)
        notes.close(shard)
        renew()
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            read = shard.first_document + shard.num_documents
            log.info(f"{recipe.dump.path}: planning; {read:,} documents read, {len(shards):,} shards planned")
    identity = teacher_identity(recipe, teacher, engine, shard_plan.corpus_sha256(shards))
    manifest = Manifest(identity=identity, corpus_counts=dict(corpus.counts), shards=tuple(shards))
    return Prepared(manifest, sample.chosen_ids(), notes.places(), dict(corpus.first_places))


def noted(recipe: Recipe, teacher: ResolvedTeacher, inputs: str | None) -> Prepared | None:
    """Return the plan that the dump holds with its places; None if it has to be made.

    Args:
        inputs: hash of what decides the plan, as it is now.
    """
    dump = location(recipe.dump.path)
    if not (dump / dump_files.MANIFEST).exists():
        return None
    theirs = Manifest.load(dump)
    found = Places.load(dump, inputs, theirs)
    if found is None:
        return None
    places, note = found
    if note.affordable != audit.affordable(sum(shard.num_bytes for shard in theirs.shards)):
        return None  # planned for devices of another kind
    engine = engine_name(recipe.teacher, recipe.placement)
    identity = teacher_identity(recipe, teacher, engine, note.planned)
    manifest = Manifest(identity=identity, corpus_counts=theirs.corpus_counts, shards=theirs.shards)
    return Prepared(manifest, frozenset(note.audited), places, note.first_places, is_noted=True)


def plan_dump(
    recipe: Recipe, corpus: Corpus, teacher: ResolvedTeacher, claims: Claims, accept_engine: str | None
) -> DumpJob:
    """Plan the dump unless it is planned, create it or check it, and return all of it as a job.

    Of processes that start at once, one plans while the others wait.
    """
    dump = location(recipe.dump.path)
    with claims.planning():
        inputs = plan_sha256(recipe)
        planned = noted(recipe, teacher, inputs)
        if planned is None:
            planned = prepare(recipe, corpus, teacher, claims.renew)
        else:
            log.info(f"{dump}: planned before, and the corpus's files are unchanged; it is not read to plan")
        tell_left_out(planned.manifest.corpus_counts, planned.first_places)
        manifest = open_or_create_dump(recipe, planned, corpus, claims, accept_engine)
        if recipe.dump.tokens is not None:
            write_vocabulary(dump, teacher.tokenizer.token_bytes)
        if not planned.is_noted and inputs is not None and inputs == plan_sha256(recipe):
            affordable = audit.affordable(sum(shard.num_bytes for shard in manifest.shards))
            sha256 = manifest.identity["corpus"]["sha256"]
            note = Note(inputs, sha256, sorted(planned.audited), affordable, planned.first_places)
            with claims.writing_json():
                planned.places.save(dump, note)
    return DumpJob(
        recipe=recipe,
        folder=dump,
        manifest=manifest,
        claims=claims,
        worker=(0, 1),
        corpus=corpus,
        teacher=teacher,
        audited=planned.audited,
        places=planned.places,
    )


def open_or_create_dump(
    recipe: Recipe, planned: Prepared, corpus: Corpus, claims: Claims, accept_engine: str | None
) -> Manifest:
    """Create the dump's folder, or check that it holds this dump, and return its manifest.

    Of processes that start at once, one writes the manifest and the others check it.
    """
    dump = location(recipe.dump.path)
    with claims.writing_json():
        extend_dump(dump, planned.manifest, corpus.reader(), planned.places, accept_engine)
        manifest = shard_plan.create_or_check_manifest(dump, planned.manifest, accept_engine)
        warn_other_libraries(dump, manifest)
        with committed(dump / dump_files.RECIPE) as path:
            save_recipe(recipe, path)
    claims.remove_dead_partials()
    return manifest
