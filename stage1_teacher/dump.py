"""The dump: shard by shard, from documents to committed Parquet files. Restarting it is the resume."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.config import DumpConfig, Recipe
from pipeline.corpus import Corpus, Document
from pipeline.covering import Targets
from pipeline.progress import Progress
from pipeline.recipe import save_recipe
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from schemas import coding
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.shard import Record, Segment, commit_shard, to_table
from stage1_teacher import plan
from stage1_teacher.engine import ListingEngine
from stage1_teacher.overlap import one_ahead
from stage1_teacher.pieces import Piece, batches, cut_pieces, spelled_lengths
from stage1_teacher.sparsify import sparsify
from stage1_teacher.teacher import Answers, Teacher, load_tokenizer, open_teacher, resolve_ids


def make_records(pieces: Sequence[Piece], answers: Answers, teacher: Teacher, dump: DumpConfig) -> list[Record]:
    """The pieces' records out of what the engine gave for them."""
    return [
        make_record(piece, targets, teacher.tokenizer, dump.top_k, dump.min_prob)
        for piece, targets in zip(pieces, teacher.targets(pieces, answers), strict=True)
    ]


def make_record(piece: Piece, targets: Targets, tokenizer: ByteTokenizer, top_k: int, min_prob: float) -> Record:
    """A piece's record from its targets, the tokenizer's prefix included."""
    targets = targets.drop_prefix(len(tokenizer.prefix))
    window = piece.window
    segment = Segment(window.supervised - window.start, window.end - window.supervised, window.has_end)
    taken = slice(segment.start, segment.start + segment.num_positions)
    realised = piece.text[segment.start :] + (b"\xff" if window.has_end else b"")
    entries = sparsify(targets.probs_PV[taken], np.frombuffer(realised, dtype=np.uint8), top_k, min_prob)
    return Record(
        doc_id=piece.doc_id,
        window_start=window.start,
        document=piece.text,
        segments=(segment,),
        teacher_token_lengths=np.array(spelled_lengths(tokenizer, piece.tokens), dtype=np.int32),
        teacher_token_codes=coding.encode_token_logprobs(targets.token_logprobs),
        dropped_codes=coding.encode_shares(targets.dropped_P[taken]),
        token_end_codes=coding.encode_shares(targets.token_end_P[taken]),
        doubt_codes=coding.encode_shares(targets.doubt_P[taken]),
        **coding.encode_entries(entries)._asdict(),
    )


class CutShard(NamedTuple):
    """A shard's pieces, and why documents were left out that the teacher's tokenizer cannot spell, by name."""

    plan: ShardPlan
    pieces: list[Piece]
    left_out: dict[str, str]


class Forwarded(NamedTuple):
    """A batch of a shard's pieces after the engine; the last batch, and it alone, brings along the shard."""

    pieces: list[Piece]
    answers: Answers
    finished: CutShard | None


class Made(NamedTuple):
    """What has been done, for the progress bar."""

    documents: int
    text_bytes: int
    tokens: int
    stored_bytes: int


def cut_shard(shard: ShardPlan, documents: Sequence[Document], teacher: Teacher) -> CutShard:
    pieces: list[Piece] = []
    left_out: dict[str, str] = {}
    for document in documents:
        try:
            pieces += cut_pieces(document, teacher.tokenizer, teacher.max_tokens, teacher.overlap_tokens)
        except SpellingError as error:
            left_out[document.doc_id] = str(error)
    return CutShard(shard, pieces, left_out)


def forward(shards: Iterable[CutShard], teacher: Teacher, batch_tokens: int) -> Iterator[Forwarded]:
    """Run the engine over the shards' pieces. No batch reaches over a shard's end, so that a shard made again is the same."""
    for shard in shards:
        parts = list(batches(shard.pieces, batch_tokens)) or [[]]
        for index, batch in enumerate(parts):
            yield Forwarded(batch, teacher.ask(batch), shard if index == len(parts) - 1 else None)


class ShardWriter:
    """Takes forwarded batches in order; collects the records of a shard and commits them once it is whole."""

    def __init__(self, teacher: Teacher, recipe: Recipe, identity: dict[str, Any], folder: Path) -> None:
        self._teacher, self._recipe, self._identity, self._folder = teacher, recipe, identity, folder
        self._records: list[Record] = []
        self._num_tokens, self._num_computed = 0, 0

    def take(self, batch: Forwarded) -> Made:
        if batch.pieces:
            self._records += make_records(batch.pieces, batch.answers, self._teacher, self._recipe.dump)
        num_tokens = sum(len(piece.tokens) + (self._teacher.start is not None) for piece in batch.pieces)
        self._num_tokens += num_tokens
        self._num_computed += batch.answers.num_tokens
        num_documents = sum(piece.window.has_end for piece in batch.pieces)
        stored_bytes = 0
        if batch.finished is not None:
            num_documents += len(batch.finished.left_out)
            stored_bytes = self._commit(batch.finished)
        num_bytes = sum(piece.window.end - piece.window.supervised for piece in batch.pieces)
        return Made(num_documents, num_bytes, num_tokens, stored_bytes)

    def _commit(self, shard: CutShard) -> int:
        table = to_table(self._records, self._identity)
        extra = {
            "bld.left_out": json.dumps(shard.left_out),
            "bld.teacher_tokens": str(self._num_tokens),
            "bld.computed_tokens": str(self._num_computed),
            "bld.shard_sha256": shard.plan.sha256,
        }
        table = table.replace_schema_metadata(
            {**table.schema.metadata, **{k.encode(): v.encode() for k, v in extra.items()}}
        )
        self._records, self._num_tokens, self._num_computed = [], 0, 0
        return commit_shard(table, shard.plan.path(self._folder), self._recipe.dump.zstd_level)


def make_shards(
    shards: Iterable[tuple[ShardPlan, list[Document]]],
    teacher: Teacher,
    recipe: Recipe,
    identity: dict[str, Any],
    folder: Path,
) -> Iterator[Made]:
    """Make and commit shards, yielding what each batch of the engine added.

    Where the engine has a device of its own, or a machine, three threads work at once: one encodes the next shard, this one drives the
    engine, one reduces the last batch and writes. On a CPU they would only take the engine's cores from it: measured, no faster.
    """
    concurrent = recipe.placement.overlap
    if concurrent is None:
        concurrent = torch.cuda.is_available() or isinstance(teacher.engine, ListingEngine)
    cut = one_ahead(shards, lambda shard: cut_shard(*shard, teacher), concurrent)
    writer = ShardWriter(teacher, recipe, identity, folder)
    yield from one_ahead(forward(cut, teacher, recipe.placement.batch_tokens), writer.take, concurrent)


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


def read_shards(todo: Sequence[ShardPlan], corpus: Corpus) -> Iterator[tuple[ShardPlan, list[Document]]]:
    """Each shard with its documents. Raises ValueError where the corpus has changed."""
    position, stream = todo[0].first_document, corpus.documents(todo[0].first_document)
    for shard in todo:
        for _ in range(shard.first_document - position):  # documents of shards that exist, or are another worker's
            next(stream)
        yield shard, shard_documents(shard, stream)
        position = shard.first_document + shard.num_documents


def prepare(recipe: Recipe, corpus: Corpus, tokenizer: ByteTokenizer, model: str) -> Manifest:
    """Plan the dump and hold its folder to the plan's identity."""
    engine = _engine_name(recipe)  # first: a server that is not the teacher fails before the corpus is read
    shards = list(plan.plan_shards(corpus, int(recipe.dump.shard_bytes)))
    start, ends = resolve_ids(recipe, tokenizer)
    served = recipe.teacher.engine == "openai"
    weights = None if served else plan.weights_sha256(model, recipe.teacher.revision)
    identity = plan.make_identity(recipe, tokenizer, start, ends, weights, engine, plan.corpus_sha256(shards))
    dump = Path(recipe.dump.path)
    manifest = plan.hold_to_identity(
        dump, Manifest(identity=identity, corpus_counts=dict(corpus.counts), shards=tuple(shards))
    )
    save_recipe(recipe, dump / "recipe.yaml")
    return manifest


def _engine_name(recipe: Recipe) -> str:
    if recipe.teacher.engine == "vllm":
        from stage1_teacher.engine_vllm import engine_version

        return engine_version()
    if recipe.teacher.engine == "openai":
        from stage1_teacher.engine_openai import engine_name

        return engine_name(recipe.teacher, recipe.placement)
    import transformers

    return f"transformers-{transformers.__version__}"


def run_teacher(recipe: Recipe, dry_run: bool = False, worker: tuple[int, int] = (0, 1)) -> None:
    """Dump, or resume a dump: every planned shard whose file is missing is made. Worker (i, n) makes each n-th of them.

    Raises:
        ValueError: the folder holds another dump, or the corpus has changed since it was planned.
    """
    if recipe.corpus.field == "messages":
        raise ValueError("corpus.field: messages cannot be dumped yet; dump plain text (corpus.field: text)")
    if dry_run:
        from pipeline.plan import print_plan

        print_plan(recipe)
        return
    dump = Path(recipe.dump.path)
    model, tokenizer = load_tokenizer(recipe)
    for remark in tokenizer.remarks():
        print(f"{dump}: the teacher's tokenizer {remark}")
    corpus = Corpus(recipe.corpus)
    manifest = prepare(recipe, corpus, tokenizer, model)
    remove_dead_partials(dump)
    todo = [s for s in manifest.shards if not s.path(dump).exists() and s.index % worker[1] == worker[0]]
    print(
        f"{dump}: {len(manifest.shards)} shards planned, {len(todo)} to make; corpus: {describe_counts(manifest.corpus_counts)}"
    )
    if todo:
        _make_shards(todo, recipe, manifest, open_teacher(recipe, model, tokenizer), corpus)
    if all(shard.path(dump).exists() for shard in manifest.shards):
        summary = summarise(dump, manifest)
        write_json(dump / "summary.json", summary)
        print(f"{dump}: complete; " + "; ".join(f"{key} {value}" for key, value in summary.items() if key != "shards"))


def _make_shards(
    todo: Sequence[ShardPlan], recipe: Recipe, manifest: Manifest, teacher: Teacher, corpus: Corpus
) -> None:
    dump = Path(recipe.dump.path)
    started = time.monotonic()
    with Progress(sum(s.num_documents for s in todo), sum(s.num_bytes for s in todo)) as progress:
        for made in make_shards(read_shards(todo, corpus), teacher, recipe, manifest.identity, dump):
            progress.update(**made._asdict())
    teacher.engine.close()
    print(f"{dump}: {len(todo)} shards in {time.monotonic() - started:.1f} s")


def summarise(dump: Path, manifest: Manifest) -> dict[str, Any]:
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
    shards = []
    for shard in manifest.shards:
        path = shard.path(dump)
        with pq.ParquetFile(path) as file:
            metadata = {k.decode(): v.decode() for k, v in file.schema_arrow.metadata.items()}
            table = file.read(columns=["segment_lengths", "segment_has_end"])
        skipped = json.loads(metadata["bld.left_out"])
        left_out |= skipped
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
    return {**totals, "left_out_by_corpus": counts, "left_out_unspellable": left_out, "shards": shards}


def describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counts.items()) or "no counts"


def remove_dead_partials(dump: Path) -> None:
    """Delete what a killed process left half written; the files of a living one are its own."""
    for partial in (*dump.glob("*.partial"), *(dump / "shards").glob("*.partial")):
        pid = partial.suffixes[-2].removeprefix(".")
        if pid.isdigit() and not _alive(int(pid)):
            partial.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
