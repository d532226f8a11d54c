"""The dump: shard by shard, from documents to committed Parquet files. Restarting it is the resume, and so is a second process."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.card import write_card
from pipeline.chat_template import ChatError
from pipeline.config import DumpConfig, PlacementConfig, Recipe
from pipeline.corpus import Corpus, Document
from pipeline.covering import Targets
from pipeline.interrupt import Terminated, terminable
from pipeline.licence import describe, with_licence
from pipeline.logs import say
from pipeline.progress import Progress
from pipeline.recipe import save_recipe
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from schemas import levels
from schemas.manifest import Manifest, ShardPlan, shard_identity, write_json
from schemas.shard import Record, commit_shard, committed, sync_folder, to_table
from schemas.store import Location, local_folder, open_parquet
from stage1_teacher import audit, cost, plan
from stage1_teacher.chat_pieces import cut_chat
from stage1_teacher.claims import Claims
from stage1_teacher.engine import ListingEngine
from stage1_teacher.extend import extend_dump
from stage1_teacher.overlap import one_ahead
from stage1_teacher.pieces import Piece, batches, cut_pieces, spelled_lengths
from stage1_teacher.restart import persist
from stage1_teacher.rounding import round_entries
from stage1_teacher.sparsify import sparsify
from stage1_teacher.teacher import Answers, Named, Teacher, load_tokenizer, open_teacher, resolve_ids


def make_records(pieces: Sequence[Piece], answers: Answers, teacher: Teacher, dump: DumpConfig) -> list[Record]:
    """The pieces' records out of what the engine gave for them."""
    found = iter(teacher.targets(pieces, answers))
    return [
        make_record(piece, [next(found) for _ in piece.stretches], teacher.tokenizer, dump.top_k, dump.min_prob)
        for piece in pieces
    ]


def make_record(
    piece: Piece, targets: Sequence[Targets], tokenizer: ByteTokenizer, top_k: int, min_prob: float
) -> Record:
    """A piece's record from the targets of its stretches, the tokenizer's prefix included."""
    taken = [slice(s.skipped, s.skipped + s.segment.num_positions) for s in piece.stretches]
    kept = list(zip(targets, taken, strict=True))
    segments = tuple(stretch.segment for stretch in piece.stretches)
    realised = b"".join(piece.text[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in segments)
    probs_PV = np.concatenate([found.probs_PV[where] for found, where in kept])
    entries = sparsify(probs_PV, np.frombuffer(realised, dtype=np.uint8), top_k, min_prob)
    rounded = round_entries(entries)
    lengths, token_logprobs = _token_columns(piece, targets, tokenizer)
    return Record(
        doc_id=piece.doc_id,
        window_start=piece.window.start,
        document=piece.text,
        segments=segments,
        teacher_token_lengths=lengths,
        teacher_token_logprobs=levels.round_token_logprobs(token_logprobs),
        entry_counts=entries.counts_P,
        dropped=levels.round_shares(np.concatenate([found.dropped_P[where] for found, where in kept])),
        token_end=levels.round_shares(np.concatenate([found.token_end_P[where] for found, where in kept])),
        doubt=levels.round_shares(np.concatenate([found.doubt_P[where] for found, where in kept])),
        symbols=rounded.symbols_E,
        logprobs=rounded.logprobs_E,
        message_roles=piece.roles,
        message_lengths=piece.lengths,
    )


def _token_columns(piece: Piece, targets: Sequence[Targets], tokenizer: ByteTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """T: bytes and log-probability of each token; what lies between stretches counts as one of log-probability 0."""
    lengths: list[int] = []
    logprobs = []
    at = 0
    for stretch, found in zip(piece.stretches, targets, strict=True):
        if stretch.start > at:
            lengths.append(stretch.start - at)
            logprobs.append(np.zeros(1))
        lengths += spelled_lengths(tokenizer, stretch.tokens, stretch.num_prefix)
        logprobs.append(found.token_logprobs)
        at = stretch.segment.start + stretch.segment.length
    if len(piece.text) > at:
        lengths.append(len(piece.text) - at)
        logprobs.append(np.zeros(1))
    return np.array(lengths, dtype=np.int32), np.concatenate(logprobs)


class CutShard(NamedTuple):
    """A shard's pieces, and why documents were left out, by name: the teacher's tokenizer cannot spell them, or its chat template
    changes them."""

    plan: ShardPlan
    pieces: list[Piece]
    left_out: dict[str, str]


class Forwarded(NamedTuple):
    """A batch of a shard's pieces after the engine; the last batch, and it alone, brings along the shard."""

    pieces: list[Piece]
    answers: Answers
    wide: dict[int, audit.Wide]  # of the audited ones, by their number in `pieces`
    finished: CutShard | None


class Made(NamedTuple):
    """What has been done, for the progress bar."""

    documents: int
    text_bytes: int
    tokens: int
    stored_bytes: int  # of a shard that was committed; else 0
    audited: int  # documents in that shard


def cut_shard(shard: ShardPlan, documents: Sequence[Document], teacher: Teacher) -> CutShard:
    pieces: list[Piece] = []
    left_out: dict[str, str] = {}
    for document in documents:
        try:
            pieces += _cut(document, teacher)
        except (SpellingError, ChatError) as error:
            left_out[document.doc_id] = str(error)
    return CutShard(shard, pieces, left_out)


def _cut(document: Document, teacher: Teacher) -> list[Piece]:
    if document.messages is None:
        return cut_pieces(document, teacher.tokenizer, teacher.max_tokens, teacher.overlap_tokens)
    assert teacher.chat is not None
    return cut_chat(
        document.doc_id, document.messages, teacher.chat, teacher.ends, teacher.max_tokens, teacher.overlap_tokens
    )


def forward(
    shards: Iterable[CutShard], teacher: Teacher, placement: PlacementConfig, audited: Set[str]
) -> Iterator[Forwarded]:
    """Run the engine over the shards' pieces. No batch reaches over a shard's end, so that a shard made again is the same.

    Args:
        audited: ids of the documents to compare with a wide covering.
    """
    for shard in shards:
        parts = list(batches(shard.pieces, placement.batch_tokens)) or [[]]
        for index, batch in enumerate(parts):
            answers, wide = persist(teacher, partial(_ask, teacher, batch, audited), placement.engine_attempts)
            yield Forwarded(batch, answers, wide, shard if index == len(parts) - 1 else None)


def _ask(teacher: Teacher, batch: list[Piece], audited: Set[str]) -> tuple[Answers, dict[int, audit.Wide]]:
    answers = teacher.ask(batch)
    return answers, {
        number: audit.read_wide(teacher, piece)
        for number, piece in enumerate(batch)
        if piece.doc_id in audited and piece.window.start == 0
    }


class ShardWriter:
    """Takes forwarded batches in order; collects the records of a shard and commits them once it is whole."""

    def __init__(self, teacher: Teacher, recipe: Recipe, identity: dict[str, Any], folder: Path) -> None:
        self._teacher, self._recipe, self._identity, self._folder = teacher, recipe, shard_identity(identity), folder
        self._records: list[Record] = []
        self._audited: list[dict[str, Any]] = []
        self._num_tokens, self._num_computed = 0, 0
        self._watch = cost.Stopwatch()

    def take(self, batch: Forwarded) -> Made:
        if batch.pieces:
            records = make_records(batch.pieces, batch.answers, self._teacher, self._recipe.dump)
            self._audited += [audit.measure(records[number], wide) for number, wide in batch.wide.items()]
            self._records += records
        num_tokens = sum(len(self._teacher.prompt(piece)) for piece in batch.pieces)
        self._num_tokens += num_tokens
        self._num_computed += batch.answers.num_tokens
        num_documents = sum(piece.window.has_end for piece in batch.pieces)
        num_audited = stored_bytes = 0
        if batch.finished is not None:
            num_documents += len(batch.finished.left_out)
            num_audited = len(self._audited)
            stored_bytes = self._commit(batch.finished)
        num_bytes = sum(piece.num_supervised for piece in batch.pieces)
        return Made(num_documents, num_bytes, num_tokens, stored_bytes, num_audited)

    def _commit(self, shard: CutShard) -> int:
        table = to_table(self._records, self._identity)
        extra = {
            "bld.left_out": json.dumps(shard.left_out),
            "bld.teacher_tokens": str(self._num_tokens),
            "bld.computed_tokens": str(self._num_computed),
            "bld.shard_sha256": shard.plan.sha256,
            "bld.engine": self._teacher.engine.name,
            cost.SECONDS_KEY: f"{self._watch.lap():.3f}",
            cost.DEVICES_KEY: cost.devices(self._recipe),
            audit.METADATA_KEY: json.dumps(self._audited),
        }
        table = table.replace_schema_metadata(
            {**table.schema.metadata, **{k.encode(): v.encode() for k, v in extra.items()}}
        )
        self._records, self._audited, self._num_tokens, self._num_computed = [], [], 0, 0
        return commit_shard(table, shard.plan.path(self._folder), self._recipe.dump.zstd_level)


def make_shards(
    shards: Iterable[tuple[ShardPlan, list[Document]]],
    teacher: Teacher,
    recipe: Recipe,
    identity: dict[str, Any],
    folder: Path,
    audited: Set[str] = frozenset(),
) -> Iterator[Made]:
    """Make and commit shards, yielding what each batch of the engine added.

    Where the engine has a device of its own, or a machine, three threads work at once: one encodes the next shard, this one
    drives the engine, one reduces the last batch and writes. On a CPU they would share the engine's cores.
    """
    concurrent = recipe.placement.overlap
    if concurrent is None:
        concurrent = torch.cuda.is_available() or isinstance(teacher.engine, ListingEngine)
    cut = one_ahead(shards, lambda shard: cut_shard(*shard, teacher), concurrent)
    writer = ShardWriter(teacher, recipe, identity, folder)
    yield from one_ahead(forward(cut, teacher, recipe.placement, audited), writer.take, concurrent)


def shard_documents(shard: ShardPlan, stream: Iterator[Document]) -> list[Document]:
    """The shard's documents off the stream, checked against the plan. Raises ValueError where the corpus has changed."""
    documents = [document for _, document in zip(range(shard.num_documents), stream, strict=False)]
    digest = hashlib.sha256(b"".join(plan.document_digest(document) for document in documents)).hexdigest()
    if digest != shard.sha256:
        raise ValueError(
            f"the corpus has changed since the dump was planned: shard {shard.index} holds other documents "
            f"({shard.first_document} to {shard.first_document + shard.num_documents}). Restore the corpus, or give a new dump.path."
        )
    return documents


def read_shards(shards: Iterable[ShardPlan], corpus: Corpus) -> Iterator[tuple[ShardPlan, list[Document]]]:
    """Each shard, in the order of the corpus, with its documents. Raises ValueError where the corpus has changed."""
    position, stream = 0, corpus.documents()
    for shard in shards:
        for _ in range(shard.first_document - position):  # documents of shards that exist, or are another process's
            next(stream)
        yield shard, shard_documents(shard, stream)
        position = shard.first_document + shard.num_documents


class Prepared(NamedTuple):
    """What a dump is to be, and which documents are audited, by id."""

    manifest: Manifest
    audited: Set[str]


def prepare(recipe: Recipe, corpus: Corpus, teacher: Named) -> Prepared:
    """Plan the dump: a pure function of corpus and recipe."""
    engine = engine_name(recipe)  # first: a server that is not the teacher fails before the corpus is read
    sample = audit.Sample(recipe.dump.audit_documents)
    shards = list(plan.plan_shards(sample.passing(corpus.documents()), int(recipe.dump.shard_bytes)))
    identity = teacher_identity(recipe, teacher, engine, plan.corpus_sha256(shards))
    manifest = Manifest(identity=identity, corpus_counts=dict(corpus.counts), shards=tuple(shards))
    return Prepared(manifest, sample.chosen())


def teacher_identity(recipe: Recipe, teacher: Named, engine: str, corpus_sha256: str) -> dict[str, Any]:
    """The identity of a dump that this teacher makes of that corpus."""
    start, ends = resolve_ids(recipe, teacher.tokenizer, teacher.chat)
    served = recipe.teacher.engine == "openai"
    weights = None if served else plan.weights_sha256(teacher.model, recipe.teacher.revision)
    return plan.make_identity(recipe, teacher.tokenizer, start, ends, weights, engine, corpus_sha256, teacher.chat)


def enter(recipe: Recipe, manifest: Manifest, corpus: Corpus, claims: Claims, accept_engine: str | None) -> Manifest:
    """Hold the dump's folder to the plan; of processes that start at once, one writes the manifest and the others check it."""
    dump = local_folder(recipe.dump.path)
    with claims.writing_json():
        for left in dump.glob("*.partial"):  # a living process writes these only in its turn, which is ours now
            left.unlink()
        extend_dump(dump, manifest, corpus)
        manifest = plan.hold_to_identity(dump, manifest, accept_engine)
        with committed(dump / "recipe.yaml") as path:
            save_recipe(recipe, path)
    remove_dead_partials(dump, claims)
    return manifest


def remove_dead_partials(dump: Path, claims: Claims) -> None:
    """Delete what a killed process left half written of shards that nobody is making."""
    for left in (dump / "shards").glob("part-*.partial"):
        index = int(left.name.removeprefix("part-").split(".")[0])
        if claims.take(index):
            left.unlink(missing_ok=True)
            claims.give_back(index)


def engine_name(recipe: Recipe) -> str:
    """The engine with its version, before it is opened."""
    if recipe.teacher.engine == "vllm":
        from stage1_teacher.engine_vllm import engine_version

        return engine_version()
    if recipe.teacher.engine == "openai":
        from stage1_teacher import engine_openai

        return engine_openai.engine_name(recipe.teacher, recipe.placement)
    import transformers

    return f"transformers-{transformers.__version__}"


def run_teacher(
    recipe: Recipe, dry_run: bool = False, worker: tuple[int, int] = (0, 1), accept_engine: str | None = None
) -> None:
    """Dump, or resume a dump: every planned shard whose file is missing, and which no other process is making, is made.

    Args:
        worker: (i, n): make only each n-th shard, from the i-th on.
        accept_engine: see `plan.hold_to_identity`.
    Raises:
        ValueError: the folder holds another dump, or the corpus has changed since it was planned.
        OSError: the folder cannot be written, or the engine failed too often.
    """
    if dry_run:
        from pipeline.plan import print_plan

        print_plan(recipe)
        return
    with terminable():
        _run(recipe, worker, accept_engine)


def _run(recipe: Recipe, worker: tuple[int, int], accept_engine: str | None) -> None:
    dump = local_folder(recipe.dump.path)
    teacher = load_tokenizer(recipe)
    for remark in teacher.tokenizer.remarks():
        say(f"{dump}: the teacher's tokenizer {remark}")
    recipe = with_licence(recipe, teacher.model)
    say(f"{dump}: {describe(recipe.teacher.license)}")
    corpus = Corpus(recipe.corpus)
    planned = prepare(recipe, corpus, teacher)
    make_folder(dump / "shards")
    with Claims(dump) as claims:
        manifest = enter(recipe, planned.manifest, corpus, claims, accept_engine)
        job = Job(recipe, manifest, planned.audited, claims, worker)
        try:
            make_missing(job, corpus, lambda: open_teacher(recipe, *teacher, branches=bool(planned.audited)))
        except (KeyboardInterrupt, Terminated):
            done = sum(shard.path(dump).exists() for shard in manifest.shards)
            say(f"{dump}: stopped; {done} of {len(manifest.shards)} shards are complete and stay")
            raise
        finish(job)


class Job(NamedTuple):
    """A dump to be made, and this process's part in it."""

    recipe: Recipe
    manifest: Manifest
    audited: Set[str]
    claims: Claims
    worker: tuple[int, int]

    @property
    def dump(self) -> Path:
        return local_folder(self.recipe.dump.path)

    def missing(self) -> list[ShardPlan]:
        """This worker's shards that are not there; who makes them may be another process."""
        index, count = self.worker
        return [s for s in self.manifest.shards if s.index % count == index and not s.path(self.dump).exists()]

    def claim(self, todo: Sequence[ShardPlan]) -> Iterator[ShardPlan]:
        """Those that nobody else is making, each claimed as it is handed out."""
        for shard in todo:
            if self.claims.take(shard.index) and not shard.path(self.dump).exists():  # it may have been made since
                yield shard


def make_missing(job: Job, corpus: Corpus, open_it: Callable[[], Teacher]) -> None:
    """Make what is missing and free, and look again: another process may have died. The teacher is opened only if there is any."""
    todo = job.missing()
    counts = describe_counts(job.manifest.corpus_counts)
    say(f"{job.dump}: {len(job.manifest.shards)} shards planned, {len(todo)} to make; corpus: {counts}")
    if next(job.claim(todo), None) is None:
        return
    (job.dump / "summary.json").unlink(missing_ok=True)  # of a dump that has lost a shard since
    teacher = open_it()
    started, num_made = time.monotonic(), 0
    with Progress(sum(s.num_documents for s in todo), sum(s.num_bytes for s in todo)) as progress:
        while True:
            before = num_made
            shards = read_shards(job.claim(job.missing()), corpus)
            for made in make_shards(shards, teacher, job.recipe, job.manifest.identity, job.dump, job.audited):
                progress.update(made.documents, made.text_bytes, made.tokens, made.stored_bytes)
                num_made += made.stored_bytes > 0
                if made.audited:
                    write_audit(job)
            if num_made == before:
                break
    teacher.engine.close()
    say(f"{job.dump}: {num_made} shards in {time.monotonic() - started:.1f} s")


def finish(job: Job) -> None:
    """Write the summary of a dump that is complete, whoever made its last shard; of another one, say what is missing."""
    dump, manifest = job.dump, job.manifest
    num_missing = sum(not shard.path(dump).exists() for shard in manifest.shards)
    if num_missing:
        say(f"{dump}: {num_missing} shards are missing: other processes make them, or run the same command again")
        return
    with job.claims.writing_json():
        summary = summarise(dump, manifest)
        write_json(dump / "summary.json", summary)
    write_audit(job)
    write_card(dump)
    say(f"{dump}: complete; " + "; ".join(f"{key} {value}" for key, value in summary.items() if key != "shards"))


def write_audit(job: Job) -> None:
    with job.claims.writing_json():
        write_json(job.dump / "audit.json", audit.gather(job.dump, job.manifest))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut takes none of them back."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def summarise(dump: Location, manifest: Manifest) -> dict[str, Any]:
    """Counts over all shards, read from the shards alone, so that it does not matter who made them or when."""
    totals: dict[str, Any] = {
        "documents": 0,
        "records": 0,
        "bytes": 0,
        "positions": 0,
        "teacher_tokens": 0,
        "computed_tokens": 0,
        "stored_bytes": 0,
    }
    left_out: dict[str, str] = {}
    engines: Counter[str] = Counter()
    told: list[dict[str, str]] = []
    shards = []
    for shard in manifest.shards:
        path = shard.path(dump)
        with open_parquet(path) as file:
            metadata = {k.decode(): v.decode() for k, v in file.schema_arrow.metadata.items()}
            table = file.read(columns=["segment_lengths", "segment_has_end"])
        if metadata["bld.shard_sha256"] != shard.sha256:  # a process of before the dump was extended wrote it late
            raise ValueError(f"{path} holds other documents than planned; delete it and run `bld teacher` again")
        told.append(metadata)
        skipped = json.loads(metadata["bld.left_out"])
        left_out |= skipped
        engines[metadata["bld.engine"]] += 1
        num_bytes = int(np.sum(table["segment_lengths"].combine_chunks().flatten().to_numpy(zero_copy_only=False)))
        num_ends = int(np.sum(table["segment_has_end"].combine_chunks().flatten().to_numpy(zero_copy_only=False)))
        totals["documents"] += shard.num_documents - len(skipped)
        totals["records"] += table.num_rows
        totals["bytes"] += num_bytes
        totals["positions"] += num_bytes + num_ends
        totals["teacher_tokens"] += int(metadata["bld.teacher_tokens"])
        totals["computed_tokens"] += int(metadata["bld.computed_tokens"])
        totals["stored_bytes"] += path.stat().st_size
        with path.open("rb") as opened:
            shards.append(
                {
                    "name": path.name,
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
                }
            )
    totals["stored_bytes_per_text_byte"] = round(totals["stored_bytes"] / max(totals["bytes"], 1), 4)
    counts = {key: value for key, value in manifest.corpus_counts.items() if key.startswith("left out")}
    return {
        **totals,
        **cost.total_cost(told),
        "left_out_by_corpus": counts,
        "left_out_unspellable": left_out,
        "shards_by_engine": dict(engines),
        "shards": shards,
    }


def describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items()) or "no counts"
