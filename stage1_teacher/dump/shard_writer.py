"""The path from documents to committed shards: encode, run the engine, reduce, write."""

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

from pipeline.config import DumpConfig, Recipe
from pipeline.corpus.documents import Document
from pipeline.runtime.devices import computes_on_gpu
from pipeline.tokenization.byte_tokenizer import SpellingError
from pipeline.tokenization.chat_template import ChatError
from schemas import levels
from schemas.dump_files import Key
from schemas.manifest import ShardPlan, shard_identity, version_in
from schemas.storage.locations import Location
from stage1_teacher.coordination.pipelined import one_ahead, pipelined
from stage1_teacher.coordination.retry import retry_with_restart
from stage1_teacher.coordination.shard_draft import Draft, sums
from stage1_teacher.coordination.shard_work import ShardProgress, ShardWork
from stage1_teacher.coordination.shard_writers import IN_THIS_PROCESS, Writers, Written
from stage1_teacher.dump import audit, shard_cost
from stage1_teacher.dump.begun import libraries
from stage1_teacher.engines.base import ListingEngine, SparseEngine
from stage1_teacher.engines.batch_sizes import call_tokens
from stage1_teacher.inputs.chat_windows import Learned, cut_chat
from stage1_teacher.inputs.encoded_windows import EncodedWindow, batches, cut_document, token_lengths
from stage1_teacher.inputs.turn_windows import cut_conversation
from stage1_teacher.inputs.windows import WindowError
from stage1_teacher.targets.assembly import assemble
from stage1_teacher.targets.engine_output import EngineOutput, SparseOutput
from stage1_teacher.targets.records import sparse_spans
from stage1_teacher.targets.teacher import Teacher


class EncodedShard(NamedTuple):
    """A shard all of whose documents have been encoded.

    Attributes:
        left_out: why documents were left out, by id: the teacher's tokenizer cannot spell them, its chat template
            changes them, or no window of `teacher.max_tokens` fits them.
    """

    plan: ShardPlan
    left_out: dict[str, str]


class EncodedBatch(NamedTuple):
    """Some windows of a shard: as many tokens as the engine gets at once."""

    windows: list[EncodedWindow]
    finished: EncodedShard | None  # the shard, with its last batch


class EngineBatch(NamedTuple):
    """A batch of a shard's windows with the engine's output."""

    windows: list[EncodedWindow]
    output: EngineOutput | SparseOutput
    references: dict[int, audit.ReferenceTargets]  # of audited windows, by index in `windows`
    finished: EncodedShard | None  # the shard, with its last batch


def encode(documents: Iterable[Document], teacher: Teacher, left_out: dict[str, str]) -> Iterator[EncodedWindow]:
    """Encode documents as windows for the teacher. Those that cannot be are added to `left_out`, with the reason."""
    for document in documents:
        try:
            windows = _cut(document, teacher)
        except (SpellingError, ChatError, WindowError) as error:
            left_out[document.doc_id] = str(error)
        else:
            yield from windows


def encode_batches(
    shard: ShardPlan, documents: Sequence[Document], teacher: Teacher, batch_tokens: int
) -> Iterator[EncodedBatch]:
    """Encode a shard, a batch at a time, the same whenever it is made; one without windows has an empty batch."""
    left_out: dict[str, str] = {}
    parts = batches(encode(documents, teacher, left_out), batch_tokens)
    before = next(parts, [])
    for part in parts:
        yield EncodedBatch(before, None)
        before = part
    yield EncodedBatch(before, EncodedShard(shard, left_out))


def _cut(document: Document, teacher: Teacher) -> list[EncodedWindow]:
    if document.messages is None:
        return cut_document(document, teacher.tokenizer, teacher.max_tokens, teacher.overlap_tokens)
    assert teacher.chat is not None
    learned = None if document.turns is None else Learned(frozenset(document.turns), document.has_end)
    to_cut = (teacher.chat, teacher.ends, teacher.max_tokens, teacher.overlap_tokens, learned)
    conversation = teacher.chat.beyond_contents(document.conversation)
    if conversation is None:
        return cut_chat(document.doc_id, document.messages, *to_cut)
    return cut_conversation(document.doc_id, conversation, *to_cut)


def forward(
    encoded: Iterable[EncodedBatch], teacher: Teacher, recipe: Recipe, audited: Set[str]
) -> Iterator[EngineBatch]:
    """Run the engine over the batches. None of them spans two shards, so a shard made again is the same.

    Args:
        audited: ids of the documents to compare with a wide covering, each in its first window with a span.
    """
    due = set(audited)  # of the shard
    for batch in encoded:
        chosen = []
        for number, window in enumerate(batch.windows):
            if window.spans and window.doc_id in due:
                chosen.append(number)
                due.discard(window.doc_id)
        if batch.finished is not None:
            due = set(audited)
        output, references = retry_with_restart(
            teacher,
            partial(_run_engine, teacher, batch.windows, recipe.dump, chosen),
            recipe.placement.max_engine_failures,
        )
        yield EngineBatch(batch.windows, output, references, batch.finished)


def _run_engine(
    teacher: Teacher, batch: list[EncodedWindow], dump: DumpConfig, audited: Sequence[int]
) -> tuple[EngineOutput | SparseOutput, dict[int, audit.ReferenceTargets]]:
    output = teacher.run_for_dump(batch, dump)
    return output, {number: audit.compute_reference(teacher, batch[number]) for number in audited}


class ShardWriter:
    """Collects the sparse targets of a shard, batch by batch and in order; the writers get it when it is complete."""

    def __init__(
        self, teacher: Teacher, recipe: Recipe, identity: dict[str, Any], folder: Location, writers: Writers
    ) -> None:
        self.teacher, self.recipe = teacher, recipe
        self._identity, self._folder, self._writers = shard_identity(identity), folder, writers
        self._version = version_in(folder)
        self._token_lengths = token_lengths(teacher.tokenizer)
        self._unwritten: dict[int, ShardProgress] = {}  # by shard, to be reported when it is committed
        self._watch = shard_cost.Stopwatch()
        self._begin()

    def _begin(self) -> None:
        self._draft = Draft(self._token_lengths, self.recipe.dump.coding == levels.EXACT, self._version)
        self._audited: list[dict[str, Any]] = []
        self._num_tokens, self._num_computed = 0, 0

    def take(self, batch: EngineBatch) -> list[ShardProgress]:
        """Take a batch; returns its progress, and that of the shards committed in the meantime."""
        windows = batch.windows
        spans = sparse_spans(windows, batch.output, self.teacher, self.recipe.dump) if windows else []
        self._draft.windows += zip(windows, spans, strict=True)
        for index, reference in batch.references.items():
            record = assemble(windows[index], spans[index], self._token_lengths, self._draft.exact)
            self._audited.append(audit.measure(record, reference))
        num_tokens = sum(len(self.teacher.prompt(window)) for window in windows)
        self._num_tokens += num_tokens
        self._num_computed += batch.output.num_tokens
        progress = ShardProgress(
            sum(window.bounds.has_end for window in windows),
            sum(window.num_supervised for window in windows),
            num_tokens,
            **sums([of_span for of_window in spans for of_span in of_window])._asdict(),
        )
        if batch.finished is None:
            return [progress, *self._report(self._writers.written())]
        left_out, index = len(batch.finished.left_out), batch.finished.plan.index
        self._unwritten[index] = ShardProgress(0, 0, 0, audited=len(self._audited), left_out=left_out)
        written = self._write(batch.finished)
        return [progress._replace(documents=progress.documents + left_out), *self._report(written)]

    def flush(self) -> list[ShardProgress]:
        """Wait for the writers, and return the progress of the shards committed in the meantime."""
        return self._report(self._writers.written(max_pending=0))

    def _report(self, written: Sequence[Written]) -> list[ShardProgress]:
        return [
            self._unwritten.pop(shard.number)._replace(committed=shard.number, stored_bytes=shard.stored_bytes)
            for shard in written
        ]

    def _write(self, shard: EncodedShard) -> list[Written]:
        extra: dict[str, str] = {
            Key.LEFT_OUT: json.dumps(shard.left_out),
            Key.TEACHER_TOKENS: str(self._num_tokens),
            Key.COMPUTED_TOKENS: str(self._num_computed),
            Key.SHARD_SHA256: shard.plan.sha256,
            Key.ENGINE: self.teacher.engine.name,
            Key.LIBRARIES: json.dumps(libraries() | _runner(self.teacher)),
            Key.AUDIT: json.dumps(self._audited),
        }
        if self.recipe.dump.tokens is not None:
            extra[Key.VOCABULARY_SIZE] = str(len(self.teacher.vocabulary.order))
        draft = self._draft
        self._begin()
        shard_cost.write_cost(self._folder, shard.plan, self._watch.lap(), shard_cost.devices(self.recipe))
        path, zstd_level = shard.plan.path(self._folder), self.recipe.dump.zstd_level
        return self._writers.write(shard.plan.index, draft, path, self._identity, extra, zstd_level)


def _runner(teacher: Teacher) -> dict[str, str]:
    """Return the engine's model runner, if it has several."""
    return {"model runner": teacher.engine.runner} if isinstance(teacher.engine, SparseEngine) else {}


def make_shards(
    shards: Iterable[ShardWork],
    teacher: Teacher,
    recipe: Recipe,
    identity: dict[str, Any],
    folder: Location,
    audited: Set[str] = frozenset(),
    writers: Writers = IN_THIS_PROCESS,
) -> Iterator[ShardProgress]:
    """Make and commit shards, and yield the progress of each engine batch."""
    writer = ShardWriter(teacher, recipe, identity, folder, writers)
    yield from fill_shards(shards, writer, audited)
    yield from writer.flush()


def fill_shards(shards: Iterable[ShardWork], writer: ShardWriter, audited: Set[str]) -> Iterator[ShardProgress]:
    """Make shards as `make_shards` does, but do not wait until the last ones are written.

    If the engine has its own device or machine, three threads work at once: one encodes the next batch, this one drives
    the engine, one collects the previous batch, for the writers to round, compress and write when the shard is
    complete. On a CPU they would compete for the engine's cores.
    """
    teacher, recipe = writer.teacher, writer.recipe
    concurrent = recipe.placement.overlap
    if concurrent is None:
        concurrent = computes_on_gpu() or isinstance(teacher.engine, ListingEngine)
    batch_tokens = call_tokens(recipe.placement)
    encoded = one_ahead(
        (encode_batches(shard, documents, teacher, batch_tokens) for shard, documents in shards),
        lambda batch: batch.finished is not None,
        concurrent,
    )
    for reports in pipelined(forward(encoded, teacher, recipe, audited), writer.take, concurrent):
        yield from reports
