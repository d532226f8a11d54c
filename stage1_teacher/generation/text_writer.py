"""The path from prompts to a committed shard of text: encode, generate, keep or leave out, write."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipeline.config import GenerateConfig, Recipe
from pipeline.corpus.documents import Document
from schemas.manifest import ShardPlan
from schemas.storage.locations import Location
from schemas.text_corpus import TextManifest, WrittenText, commit_text_shard
from stage1_teacher.coordination.retry import retry_with_restart
from stage1_teacher.dump.begun import libraries
from stage1_teacher.generation.base import Draw, Drawn
from stage1_teacher.generation.completions import DUPLICATE, LeftOutError, make_row
from stage1_teacher.generation.prompts import Prompt, encode_prompts, seed_of
from stage1_teacher.generation.registry import OpenGenerator
from stage1_teacher.generation.segmentation import Counts, add_counts, count_own
from stage1_teacher.generation.writer import Writer

Wanted = tuple[Prompt, int]  # a prompt, and the number of its completion
Report = Callable[[int, int, int], None]  # prompts, their bytes, tokens written


class TextWriter:
    """Writes shards of text with an opened generator."""

    def __init__(
        self, recipe: Recipe, config: GenerateConfig, writer: Writer, generator: OpenGenerator, folder: Location
    ) -> None:
        self._recipe, self._config, self._writer = recipe, config, writer
        self._generator, self._folder = generator, folder

    def write(self, shard: ShardPlan, documents: Sequence[Document], manifest: TextManifest, report: Report) -> int:
        """Write a shard, unless it exists; returns its size in bytes."""
        left_out: dict[str, str] = {}
        prompts = list(encode_prompts(documents, self._writer, self._config, left_out))
        report(len(left_out), sum(len(d.text) for d in documents if d.doc_id in left_out), 0)
        sizes = {document.doc_id: len(document.text) for document in documents}
        wanted = [(prompt, number) for prompt in prompts for number in range(self._config.completions)]
        rows: list[WrittenText] = []
        counts: Counter[str] = Counter()
        reasons: dict[str, dict[str, Any]] = {}
        own: Counts = {}
        said: tuple[str, set[object]] = ("", set())  # a prompt, and its completions so far
        for at in range(0, len(wanted), self._generator.generator.batch_prompts):
            batch = wanted[at : at + self._generator.generator.batch_prompts]
            for (prompt, number), drawn in zip(batch, self._drawn(batch), strict=True):
                counts["completions"] += 1
                counts["written_tokens"] += len(drawn.tokens) + drawn.is_ended
                said = said if said[0] == prompt.doc_id else (prompt.doc_id, set())
                try:
                    row = self._row(prompt, number, drawn, said[1])
                except LeftOutError as error:
                    _count_reason(reasons, str(error), f"{prompt.doc_id}/{number}")
                else:
                    rows.append(row)
                    add_counts(own, count_own(prompt.text.encode(), drawn.tokens, self._writer.tokenizer))
                    counts["ended"] += row.is_finished
                is_last = number == self._config.completions - 1
                report(is_last, sizes[prompt.doc_id] * is_last, len(drawn.tokens))
        counts["prompt_tokens"] = sum(len(prompt.tokens) for prompt in prompts)
        counted = {
            "prompts": len(documents),
            "kept": len(rows),
            "supervised_bytes": sum(_num_written_bytes(row) for row in rows),
            **{key: counts[key] for key in ("completions", "ended", "prompt_tokens", "written_tokens")},
            "segmentation": own,
            "left_out_prompts": _grouped(left_out),
            "left_out_completions": reasons,
            "engine": self._generator.generator.name,
            "libraries": libraries(),
            "documents_sha256": shard.sha256,
        }
        return commit_text_shard(rows, shard.path(self._folder), manifest.identity, counted)

    def _drawn(self, batch: Sequence[Wanted]) -> list[Drawn]:
        draws = [Draw(prompt.tokens, seed_of(self._config.seed, prompt.doc_id, number)) for prompt, number in batch]
        max_failures = self._recipe.placement.max_engine_failures
        return retry_with_restart(self._generator, partial(self._generator.generate, draws), max_failures)

    def _row(self, prompt: Prompt, number: int, drawn: Drawn, said: set[object]) -> WrittenText:
        """Make a completion's row. Raises LeftOutError, also if an earlier one of the prompt says the same."""
        seed = seed_of(self._config.seed, prompt.doc_id, number)
        row = make_row(prompt, number, seed, drawn, self._writer, self._config)
        content = row.text or tuple(row.messages[-1].items())
        if content in said:
            raise LeftOutError(DUPLICATE)
        said.add(content)
        return row


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
