"""The dump: shard by shard, from documents to committed Parquet files. Restarting it is the resume."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import Recipe
from pipeline.corpus import Corpus, Document
from pipeline.covering import Covering
from pipeline.progress import Progress
from pipeline.recipe import save_recipe
from pipeline.source import resolve_model, resolve_tokenizer
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from pipeline.vocabulary import Vocabulary
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.shard import Record, Segment, commit_shard, to_table
from stage1_teacher import plan
from stage1_teacher.engine import Engine, open_engine
from stage1_teacher.head import Head, load_head
from stage1_teacher.sparsify import sparsify
from stage1_teacher.windows import Window, cut_windows


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to be asked: engine, sorted head, vocabulary and tokenizer."""

    engine: Engine
    head: Head
    vocabulary: Vocabulary
    tokenizer: ByteTokenizer
    start: int | None
    max_tokens: int
    overlap_tokens: int
    reduce_rows: int


@dataclass(frozen=True)
class Piece:
    """One record to be: a window of a document with its tokens."""

    doc_id: str
    window: Window
    text: bytes
    tokens: list[int]


def resolve_ids(recipe: Recipe, tokenizer: ByteTokenizer) -> tuple[int | None, tuple[int, ...]]:
    """The start token and the tokens that mean END, as the recipe or else the tokenizer has them."""
    teacher = recipe.teacher
    start = tokenizer.token_id(teacher.start) if teacher.start else tokenizer.default_start
    ends = tuple(tokenizer.token_id(name) for name in teacher.end)
    if not ends and tokenizer.default_end is not None:
        ends = (tokenizer.default_end,)
    if start is None:
        raise ValueError(
            "the teacher's tokenizer names no start token; give teacher.start, e.g. teacher.start=<|endoftext|>"
        )
    if not ends:
        raise ValueError(
            "the teacher's tokenizer names no end token; give teacher.end, e.g. teacher.end=[<|endoftext|>]"
        )
    return start, ends


def open_teacher(recipe: Recipe, model: str, tokenizer: ByteTokenizer) -> Teacher:
    """Load engine and head. The head is read first, so that a wrong tokenizer fails before the engine starts."""
    teacher, placement = recipe.teacher, recipe.placement
    start, ends = resolve_ids(recipe, tokenizer)
    head, vocabulary = load_head(
        model, teacher.revision, getattr(torch, teacher.dtype), tokenizer.token_bytes, ends, teacher.trust_remote_code
    )
    if torch.cuda.is_available():
        head = head.to("cuda")
    engine = open_engine(model, teacher, placement)
    return Teacher(
        engine, head, vocabulary, tokenizer, start, teacher.max_tokens, teacher.overlap_tokens, placement.reduce_rows
    )


def cut_pieces(document: Document, tokenizer: ByteTokenizer, max_tokens: int, overlap: int) -> list[Piece]:
    """A document's windows, encoded. Raises SpellingError where the tokens do not spell the bytes."""
    budget = max_tokens - 1  # the start token takes one
    tokens = tokenizer.encode(document.text)
    if len(tokens) <= budget:
        return [Piece(document.doc_id, Window(0, len(document.text), 0, True), document.text, tokens)]
    lengths = spelled_lengths(tokenizer, tokens)
    windows = cut_windows(document.text, lengths, lambda part: len(tokenizer.encode(part)), budget, overlap)
    texts = [document.text[window.start : window.end] for window in windows]
    return [Piece(document.doc_id, w, text, tokenizer.encode(text)) for w, text in zip(windows, texts, strict=True)]


def spelled_lengths(tokenizer: ByteTokenizer, tokens: Sequence[int]) -> list[int]:
    """Bytes of the document in each token: what the tokenizer puts before the document is taken off the first."""
    lengths = [len(tokenizer.token_bytes[token] or b"") for token in tokens]
    if lengths:
        lengths[0] -= len(tokenizer.prefix)
    return lengths


def make_record(piece: Piece, teacher: Teacher, hidden_RD: torch.Tensor, top_k: int, min_prob: float) -> Record:
    """Reduce a piece's hidden states to its record."""
    prefix = teacher.tokenizer.prefix
    covering = Covering(teacher.vocabulary, piece.tokens, prefix + piece.text)
    rows = teacher.head.rows(hidden_RD, teacher.reduce_rows)
    targets = covering.targets(covering.reduce_row(row, probs_C) for row, probs_C in enumerate(rows))
    targets = targets.drop_prefix(len(prefix))
    window = piece.window
    segment = Segment(window.supervised - window.start, window.end - window.supervised, window.has_end)
    taken = slice(segment.start, segment.start + segment.num_positions)
    realised = piece.text[segment.start :] + (b"\xff" if window.has_end else b"")
    counts, symbols, logprobs = sparsify(
        targets.probs_PV[taken], np.frombuffer(realised, dtype=np.uint8), top_k, min_prob
    )
    return Record(
        doc_id=piece.doc_id,
        window_start=window.start,
        document=piece.text,
        segments=(segment,),
        teacher_token_lengths=np.array(spelled_lengths(teacher.tokenizer, piece.tokens), dtype=np.int32),
        teacher_token_logprobs=targets.token_logprobs.astype(np.float32),
        entry_counts=counts,
        dropped=targets.dropped_P[taken].astype(np.float16),
        token_end=targets.token_end_P[taken].astype(np.float16),
        doubt=targets.doubt_P[taken].astype(np.float16),
        symbols=symbols,
        logprobs=logprobs,
    )


def _batches(pieces: Sequence[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces in order, about `batch_tokens` at once: the same batches whenever the shard is made."""
    batch: list[Piece] = []
    tokens = 0
    for piece in pieces:
        if batch and tokens + len(piece.tokens) + 1 > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(piece)
        tokens += len(piece.tokens) + 1
    if batch:
        yield batch


def make_shard(
    shard: ShardPlan,
    documents: Sequence[Document],
    teacher: Teacher,
    recipe: Recipe,
    identity: dict[str, Any],
    progress: Progress,
) -> pa.Table:
    """The table of one shard; documents that the teacher's tokenizer cannot spell are named in its metadata."""
    pieces: list[Piece] = []
    left_out: dict[str, str] = {}
    for document in documents:
        try:
            pieces += cut_pieces(document, teacher.tokenizer, teacher.max_tokens, teacher.overlap_tokens)
        except SpellingError as error:
            left_out[document.doc_id] = str(error)
    if left_out:
        progress.update(documents=len(left_out))
    records: list[Record] = []
    num_tokens = 0
    start = [] if teacher.start is None else [teacher.start]
    for batch in _batches(pieces, recipe.placement.batch_tokens):
        hidden = teacher.engine.hidden_states([start + piece.tokens for piece in batch])
        for piece, hidden_RD in zip(batch, hidden, strict=True):
            records.append(make_record(piece, teacher, hidden_RD, recipe.dump.top_k, recipe.dump.min_prob))
            num_tokens += len(piece.tokens) + len(start)
            progress.update(
                documents=int(piece.window.has_end),
                text_bytes=piece.window.end - piece.window.supervised,
                tokens=len(piece.tokens) + len(start),
            )
    table = to_table(records, identity)
    extra = {
        "bld.left_out": json.dumps(left_out),
        "bld.teacher_tokens": str(num_tokens),
        "bld.shard_sha256": shard.sha256,
    }
    return table.replace_schema_metadata(
        {**table.schema.metadata, **{k.encode(): v.encode() for k, v in extra.items()}}
    )


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


def prepare(recipe: Recipe, corpus: Corpus, tokenizer: ByteTokenizer, model: str) -> Manifest:
    """Plan the dump and hold its folder to the plan's identity."""
    shards = list(plan.plan_shards(corpus, int(recipe.dump.shard_bytes)))
    start, ends = resolve_ids(recipe, tokenizer)
    weights = plan.weights_sha256(model, recipe.teacher.revision)
    identity = plan.make_identity(
        recipe, tokenizer, start, ends, weights, _engine_name(recipe), plan.corpus_sha256(shards)
    )
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
    model = resolve_model(recipe.teacher.model, recipe.teacher.revision)
    tokenizer = ByteTokenizer.load(
        resolve_tokenizer(recipe.teacher.tokenizer) if recipe.teacher.tokenizer else model,
        recipe.teacher.trust_remote_code,
    )
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
        position, stream = todo[0].first_document, corpus.documents(todo[0].first_document)
        for shard in todo:
            for _ in range(shard.first_document - position):  # documents of shards that exist, or are another worker's
                next(stream)
            documents = shard_documents(shard, stream)
            position = shard.first_document + shard.num_documents
            table = make_shard(shard, documents, teacher, recipe, manifest.identity, progress)
            progress.update(stored_bytes=commit_shard(table, shard.path(dump), recipe.dump.zstd_level))
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
