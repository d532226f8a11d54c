"""The dump: shard by shard, from documents to committed Parquet files. Restarting it is the resume."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.config import DumpConfig, Recipe
from pipeline.corpus import Corpus, Document
from pipeline.covering import Covering, Targets
from pipeline.listed import ListedRows, listed_targets
from pipeline.progress import Progress
from pipeline.recipe import save_recipe
from pipeline.source import resolve_model, resolve_tokenizer
from pipeline.tokenizer_bytes import ByteTokenizer, SpellingError
from pipeline.vocabulary import Vocabulary
from schemas.manifest import Manifest, ShardPlan, write_json
from schemas.shard import Record, Segment, commit_shard, to_table
from stage1_teacher import plan
from stage1_teacher.engine import Engine, ListingEngine, open_engine
from stage1_teacher.head import load_head
from stage1_teacher.overlap import one_ahead
from stage1_teacher.reduce import Reducer, Rows
from stage1_teacher.sparsify import sparsify
from stage1_teacher.windows import Window, cut_windows

Answer = torch.Tensor | ListedRows  # of an engine to a prompt: hidden states, or listed tokens


@dataclass(frozen=True)
class Teacher:
    """A teacher ready to be asked: engine, vocabulary, tokenizer, and the head with what reduces its rows."""

    engine: Engine | ListingEngine
    vocabulary: Vocabulary
    tokenizer: ByteTokenizer
    start: int | None
    max_tokens: int
    overlap_tokens: int
    reducer: Reducer | None  # None where the engine lists tokens itself

    def ask(self, prompts: Sequence[Sequence[int]]) -> Sequence[Answer]:
        """What the engine gives for each prompt of token ids."""
        if isinstance(self.engine, ListingEngine):
            return self.engine.listed_rows(prompts)
        return self.engine.hidden_states(prompts)

    def targets(self, coverings: Sequence[Covering], answers: Sequence[Answer]) -> list[Targets]:
        """Each covering's targets, out of what the engine gave for its prompt."""
        pairs = list(zip(coverings, answers, strict=True))
        if self.reducer is None:
            return [listed_targets(covering, cast(ListedRows, answer)) for covering, answer in pairs]
        reduced = self.reducer.reduce(
            [Rows(covering, covering.offsets, cast(torch.Tensor, answer)) for covering, answer in pairs]
        )
        return [covering.targets(rows) for covering, rows in zip(coverings, reduced, strict=True)]


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
    if teacher.engine == "openai":
        return _open_served(recipe, tokenizer, start, ends)
    head, vocabulary = load_head(
        model, teacher.revision, getattr(torch, teacher.dtype), tokenizer.token_bytes, ends, teacher.trust_remote_code
    )
    if torch.cuda.is_available():
        head = head.to("cuda")
    reducer = Reducer(head, vocabulary, placement.reduce_rows)
    engine = open_engine(model, teacher, placement)
    return Teacher(engine, vocabulary, tokenizer, start, teacher.max_tokens, teacher.overlap_tokens, reducer)


def _open_served(recipe: Recipe, tokenizer: ByteTokenizer, start: int | None, ends: tuple[int, ...]) -> Teacher:
    """A teacher behind a server: no weights here, and the vocabulary is as wide as the tokenizer's."""
    from stage1_teacher.engine_openai import OpenAIEngine

    teacher, placement = recipe.teacher, recipe.placement
    engine = OpenAIEngine(teacher, placement, tokenizer, start, ends[0])
    print(
        f"{placement.base_url}: {teacher.name_at_server}, {engine.name}. Targets come from the {teacher.prompt_logprobs} "
        "most probable tokens of each row (teacher.prompt_logprobs), not from the whole softmax; what lies on other "
        "tokens is counted in dropped and doubt."
    )
    vocabulary = Vocabulary(tokenizer.token_bytes, ends, len(tokenizer.token_bytes))
    return Teacher(engine, vocabulary, tokenizer, start, teacher.max_tokens, teacher.overlap_tokens, None)


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


def make_records(
    pieces: Sequence[Piece], answers: Sequence[Answer], teacher: Teacher, dump: DumpConfig
) -> list[Record]:
    """Reduce what the engine gave for the pieces (`Teacher.ask`) to their records."""
    prefix = teacher.tokenizer.prefix
    coverings = [Covering(teacher.vocabulary, piece.tokens, prefix + piece.text) for piece in pieces]
    return [
        make_record(piece, targets, teacher.tokenizer, dump.top_k, dump.min_prob)
        for piece, targets in zip(pieces, teacher.targets(coverings, answers), strict=True)
    ]


def make_record(piece: Piece, targets: Targets, tokenizer: ByteTokenizer, top_k: int, min_prob: float) -> Record:
    """A piece's record from its targets, the tokenizer's prefix included."""
    targets = targets.drop_prefix(len(tokenizer.prefix))
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
        teacher_token_lengths=np.array(spelled_lengths(tokenizer, piece.tokens), dtype=np.int32),
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


class CutShard(NamedTuple):
    """A shard's pieces, and why documents were left out that the teacher's tokenizer cannot spell, by name."""

    plan: ShardPlan
    pieces: list[Piece]
    left_out: dict[str, str]


class Forwarded(NamedTuple):
    """A batch of a shard's pieces after the engine; the last batch, and it alone, brings along the shard."""

    pieces: list[Piece]
    answers: Sequence[Answer]
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
    start = [] if teacher.start is None else [teacher.start]
    for shard in shards:
        batches = list(_batches(shard.pieces, batch_tokens)) or [[]]
        for index, batch in enumerate(batches):
            answers = teacher.ask([start + piece.tokens for piece in batch]) if batch else []
            yield Forwarded(batch, answers, shard if index == len(batches) - 1 else None)


class ShardWriter:
    """Takes forwarded batches in order; collects the records of a shard and commits them once it is whole."""

    def __init__(self, teacher: Teacher, recipe: Recipe, identity: dict[str, Any], folder: Path) -> None:
        self._teacher, self._recipe, self._identity, self._folder = teacher, recipe, identity, folder
        self._records: list[Record] = []
        self._num_tokens = 0

    def take(self, batch: Forwarded) -> Made:
        if batch.pieces:
            self._records += make_records(batch.pieces, batch.answers, self._teacher, self._recipe.dump)
        num_tokens = sum(len(piece.tokens) + (self._teacher.start is not None) for piece in batch.pieces)
        self._num_tokens += num_tokens
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
            "bld.shard_sha256": shard.plan.sha256,
        }
        table = table.replace_schema_metadata(
            {**table.schema.metadata, **{k.encode(): v.encode() for k, v in extra.items()}}
        )
        self._records, self._num_tokens = [], 0
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


def load_tokenizer(recipe: Recipe) -> tuple[str, ByteTokenizer]:
    """The teacher's model, resolved (a served one that has a tokenizer of its own is a mere name), and its tokenizer."""
    teacher = recipe.teacher
    named = teacher.engine == "openai" and teacher.tokenizer is not None
    model = teacher.model if named else resolve_model(teacher.model, teacher.revision)
    source = resolve_tokenizer(teacher.tokenizer) if teacher.tokenizer else model
    return model, ByteTokenizer.load(source, teacher.trust_remote_code)


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
