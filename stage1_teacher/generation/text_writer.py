"""The path from prompts to a committed shard of text: encode, generate, keep or leave out, write."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pipeline.config import Recipe, generate_config
from pipeline.corpus.documents import Document
from pipeline.runtime import log
from pipeline.runtime.dtypes import slow_dtype
from schemas import dump_files
from schemas.manifest import ShardPlan
from schemas.storage.locations import location
from schemas.text_corpus import TextManifest, WrittenText, commit_text_shard
from stage1_teacher.coordination.retry import retry_with_restart
from stage1_teacher.coordination.shard_work import ShardProgress, ShardWork
from stage1_teacher.dump.begun import libraries
from stage1_teacher.generation.base import Draw, Drawn
from stage1_teacher.generation.completions import DUPLICATE, LeftOutError, make_row
from stage1_teacher.generation.plan import require_identity, text_identity
from stage1_teacher.generation.prompts import Prompt, encode_prompts, seed_of
from stage1_teacher.generation.registry import OpenGenerator
from stage1_teacher.generation.segmentation import Counts, add_counts, count_own
from stage1_teacher.generation.writer import Writer, generator_request, resolve_writer

Wanted = tuple[Prompt, int]  # a prompt, and the number of its completion


class TextTask(NamedTuple):
    """The part of a written corpus's settings that an engine needs."""

    recipe: Recipe
    identity: dict[str, Any]

    def check(self, place: str) -> None:
        config = generate_config(self.recipe)
        folder = location(config.path)
        if not (folder / dump_files.TEXT_MANIFEST).exists():
            raise ValueError(
                f"{place} cannot find {folder}: generate.path must be a folder that all machines share under the same "
                "path, or an address (s3://bucket/folder)"
            )
        ours = text_identity(self.recipe, config, resolve_writer(self.recipe), self.identity["prompts"]["sha256"])
        require_identity(folder, TextManifest.load(folder).identity, ours)

    @contextmanager
    def open(self, over_machines: bool = False) -> Iterator["TextWriter"]:
        with self.open_resolved(resolve_writer(self.recipe), over_machines) as opened:
            yield opened

    @contextmanager
    def open_resolved(self, writer: Writer, over_machines: bool = False) -> Iterator["TextWriter"]:
        """Open the engine of a writer that has been looked up."""
        if not writer.section.engine_spec.served and (slow := slow_dtype("teacher.dtype", writer.section.dtype)):
            log.warning(slow)
        request = generator_request(writer, self.recipe)._replace(over_machines=over_machines)
        with closing(OpenGenerator(request)) as generator:
            yield TextWriter(self, writer, generator)


class TextWriter:
    """Writes shards of text with an opened generator."""

    def __init__(self, task: "TextTask", writer: Writer, generator: OpenGenerator) -> None:
        self._config, self._identity = generate_config(task.recipe), task.identity
        self._writer, self._generator = writer, generator
        self._max_failures = task.recipe.placement.max_engine_failures
        self._folder = location(self._config.path)

    def make(self, shards: Iterable[ShardWork]) -> Iterator[ShardProgress]:
        """Write shards, unless they exist, and yield what each batch added; each is committed before the next."""
        for shard, documents in shards:
            yield from self._write(shard, documents)

    def flush(self) -> Iterator[ShardProgress]:
        return iter(())

    def _write(self, shard: ShardPlan, documents: Sequence[Document]) -> Iterator[ShardProgress]:
        left_out: dict[str, str] = {}
        prompts = list(encode_prompts(documents, self._writer, self._config, left_out))
        yield ShardProgress(len(left_out), sum(len(d.text) for d in documents if d.doc_id in left_out), 0)
        sizes = {document.doc_id: len(document.text) for document in documents}
        wanted = [(prompt, number) for prompt in prompts for number in range(self._config.completions)]
        drafted = _Drafted()
        said: tuple[str, set[object]] = ("", set())  # a prompt, and its completions so far
        for at in range(0, len(wanted), self._generator.generator.batch_prompts):
            batch = wanted[at : at + self._generator.generator.batch_prompts]
            finished = tokens = num_bytes = 0
            for (prompt, number), drawn in zip(batch, self._drawn(batch), strict=True):
                said = said if said[0] == prompt.doc_id else (prompt.doc_id, set())
                self._take(drafted, prompt, number, drawn, said[1])
                tokens += len(drawn.tokens) + drawn.is_ended
                if number == self._config.completions - 1:
                    finished, num_bytes = finished + 1, num_bytes + sizes[prompt.doc_id]
            yield ShardProgress(finished, num_bytes, tokens)
        counted = {
            "prompts": len(documents),
            "kept": len(drafted.rows),
            "supervised_bytes": sum(_num_written_bytes(row) for row in drafted.rows),
            **{key: drafted.counts[key] for key in ("completions", "ended", "written_tokens")},
            "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts),
            "segmentation": drafted.own,
            "left_out_prompts": _grouped(left_out),
            "left_out_completions": drafted.reasons,
            "engine": self._generator.generator.name,
            "libraries": libraries(),
            "documents_sha256": shard.sha256,
        }
        stored = commit_text_shard(drafted.rows, shard.path(self._folder), self._identity, counted)
        yield ShardProgress(0, 0, 0, stored_bytes=stored, committed=shard.index, left_out=len(left_out))

    def _take(self, drafted: "_Drafted", prompt: Prompt, number: int, drawn: Drawn, said: set[object]) -> None:
        """Add a completion to a shard, as a row or to those that are left out."""
        drafted.counts["completions"] += 1
        drafted.counts["written_tokens"] += len(drawn.tokens) + drawn.is_ended
        try:
            row = self._row(prompt, number, drawn, said)
        except LeftOutError as error:
            _count_reason(drafted.reasons, str(error), f"{prompt.doc_id}/{number}")
            return
        drafted.rows.append(row)
        drafted.counts["ended"] += row.is_finished
        add_counts(drafted.own, count_own(prompt.text.encode(), drawn.tokens, self._writer.tokenizer))

    def _drawn(self, batch: Sequence[Wanted]) -> list[Drawn]:
        draws = [Draw(prompt.tokens, seed_of(self._config.seed, prompt.doc_id, number)) for prompt, number in batch]
        return retry_with_restart(self._generator, partial(self._generator.generate, draws), self._max_failures)

    def _row(self, prompt: Prompt, number: int, drawn: Drawn, said: set[object]) -> WrittenText:
        """Make a completion's row. Raises LeftOutError, also if an earlier one of the prompt says the same."""
        seed = seed_of(self._config.seed, prompt.doc_id, number)
        row = make_row(prompt, number, seed, drawn, self._writer, self._config)
        content = row.text or tuple(row.messages[-1].items())
        if content in said:
            raise LeftOutError(DUPLICATE)
        said.add(content)
        return row


@dataclass
class _Drafted:
    """A shard that is being written."""

    rows: list[WrittenText] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: Counts = field(default_factory=dict)


def _num_written_bytes(row: WrittenText) -> int:
    """Count the bytes that the model wrote and that are kept; in a chat, of the last message."""
    if not row.messages:
        return sum(segment.length for segment in row.segments)
    return sum(len(row.messages[-1].get(key, "").encode()) for key in ("content", "reasoning_content"))


def _count_reason(reasons: dict[str, dict[str, Any]], reason: str, name: str) -> None:
    counted = reasons.setdefault(reason, {"number": 0, "first": name})
    counted["number"] += 1


def _grouped(left_out: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return for each reason how many are left out, and the first."""
    reasons: dict[str, dict[str, Any]] = {}
    for name, reason in left_out.items():
        _count_reason(reasons, reason, name)
    return reasons
