"""Host time per token of a dump beside the engine, step by step.

    .venv/bin/python -m tests.bench.host_path [--tokens 40000] [--rounds 3] [--processes 2] [--tokenizers gpt2,gemma3]

The engine costs nothing here: a row's range sums are made once, by the CPU's kernel, from a few rows of random logits,
and are not timed. What is timed is what the dump's process and its engine's worker do on their host; the sums into
sparse targets, which a GPU does itself, are told apart. No GPU and no weights are needed.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import typer

from pipeline.corpus.documents import Document
from pipeline.covering.covering import Covering
from pipeline.covering.vocabulary import Vocabulary
from pipeline.sources.resolve import resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas import ARITHMETIC
from schemas.shard import commit_shard, to_table
from stage1_teacher.inputs.encoded_windows import EncodedWindow, cut_document, token_lengths
from stage1_teacher.reduction.messages import Answering, read_spans, spans_message
from stage1_teacher.reduction.reducer import CpuKernel
from stage1_teacher.reduction.sparse_targets import Sparsity
from stage1_teacher.reduction.types import Masses
from stage1_teacher.targets.assembly import assemble
from stage1_teacher.targets.engine_output import span_requests
from tests.bench.texts import encyclopaedic
from tests.support.families import FAMILIES

TOKENIZERS = ("gpt2", "llama3", "qwen", "gemma3")
DOCUMENT_BYTES = (500, 2000, 8000)
ROUNDS_OF_CLOCK = 5
LOGIT_ROWS = 64  # random rows, used in turn
SPREAD = 3.5  # nats, of the logits of all other tokens
LIKELY = (
    0.9,
    0.3,
)  # beta distribution of the next token's probability; some 4 entries a position then, as with a teacher on English


class Task(NamedTuple):
    """Documents and all that a step needs of those before it."""

    tokenizer: ByteTokenizer
    vocabulary: Vocabulary
    documents: list[Document]
    pieces: list[EncodedWindow]
    masses: list[Masses]

    @property
    def num_tokens(self) -> int:
        """Count the documents' tokens."""
        return sum(len(piece.tokens) for piece in self.pieces)


def make_task(name: str, document_bytes: int, num_tokens: int) -> Task:
    """Cut encyclopaedic text into documents of one length, and make the range sums of their rows."""
    tokenizer = ByteTokenizer.load(resolve_tokenizer(FAMILIES[name].source))
    # An id of padding means END: some of these tokenizers name none.
    width = len(tokenizer.token_bytes)
    vocabulary = Vocabulary(tokenizer.token_bytes, [width], width + 1)
    text = b"\n\n".join(text for _, text in encyclopaedic(100)).decode()
    cuts = range(0, len(text) - document_bytes, document_bytes)
    documents: list[Document] = []
    pieces: list[EncodedWindow] = []
    for first in cuts:
        document = Document(str(first), text[first : first + document_bytes].encode(), None)
        documents.append(document)
        pieces += cut_document(document, tokenizer, 1 << 20, 0)
        if sum(len(piece.tokens) for piece in pieces) >= num_tokens:
            break
    coverings = [Covering(vocabulary, piece.tokens, piece.text) for piece in pieces]
    return Task(tokenizer, vocabulary, documents, pieces, _masses(vocabulary, coverings))


def _masses(vocabulary: Vocabulary, coverings: Sequence[Covering]) -> list[Masses]:
    rng = np.random.default_rng(0)
    width = len(vocabulary.order)
    kernel = CpuKernel(vocabulary)
    random_RC = SPREAD * rng.normal(size=(LOGIT_ROWS, width)).astype(np.float32)
    found = []
    for covering in coverings:
        intervals = covering.canonical
        masses = Masses.empty(intervals)
        for first in range(0, intervals.num_rows, LOGIT_ROWS):
            logits_RC = random_RC[: intervals.num_rows - first].copy()
            columns_R = intervals.columns_R[first : first + len(logits_RC)]
            odds_R = rng.beta(*LIKELY, size=len(columns_R)).clip(1e-4, 1 - 1e-4)
            total_R = np.log(np.exp(logits_RC).sum(axis=1))
            logits_RC[np.arange(len(columns_R)), columns_R] = total_R + np.log(odds_R / (1 - odds_R))
            logits_RV = np.ascontiguousarray(logits_RC[:, vocabulary.column])
            kernel(torch.from_numpy(logits_RV), first, intervals, masses)
        found.append(masses)
    return found


ON_DEVICE = "worker: sums into sparse targets"  # a GPU does this itself


def measure(task: Task, zstd_level: int, folder: Path) -> dict[str, float]:
    """Return microseconds of CPU time per token, by step, and what crosses from the worker to the dump's process."""
    spent: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        spent[name] = spent.get(name, 0.0) + (time.process_time() - started) * 1e6 / task.num_tokens

    sparsity = Sparsity(16, 0.04, False, ARITHMETIC)
    with step("encode"):
        pieces = [piece for document in task.documents for piece in cut_document(document, task.tokenizer, 1 << 20, 0)]
    with step("request"):
        messages = [spans_message(of_piece, sparsity) for of_piece in span_requests(pieces)]
    records, num_bytes, lengths = [], 0, token_lengths(task.tokenizer)
    for piece, message, masses in zip(pieces, messages, task.masses, strict=True):
        with step("worker: which ranges"):
            answering = Answering(message, task.vocabulary)
        answering.rows.take(0, masses)
        with step(ON_DEVICE):
            answering.sum_up()
        with step("worker: answer"):
            answer = answering.bytes()
        num_bytes += len(answer)
        with step("record"):
            records.append(assemble(piece, read_spans(answer), lengths))
    with step(f"Parquet, zstd {zstd_level}"):
        commit_shard(to_table(records, {}), folder / "shard.parquet", zstd_level)
    (folder / "shard.parquet").unlink()
    entries = sum(int(record.entry_counts.sum()) for record in records)
    positions = sum(len(record.entry_counts) for record in records)
    everything = sum(spent.values())
    return spent | {
        "all": everything,
        "without the device's": everything - spent[ON_DEVICE],
        "bytes a token cross": num_bytes / task.num_tokens,
        "entries a position": entries / positions,
    }


def throughput(name: str, document_bytes: int, num_tokens: int, zstd_level: int, processes: int) -> tuple[float, float]:
    """Return tokens per second of so many processes at once, by the clock, and how many cores each kept busy."""
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(processes), context.Queue()
    arguments = (name, document_bytes, num_tokens, zstd_level, ready, queue)
    workers = [context.Process(target=_work, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return sum(rate for rate, _ in found), max(cores for _, cores in found)


def _work(name: str, document_bytes: int, num_tokens: int, zstd_level: int, ready: Any, queue: Any) -> None:
    # One core each, or one process alone would already use several.
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    task = make_task(name, document_bytes, num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        measure(task, zstd_level, Path(folder))  # compiles
        ready.wait()
        started, busy = time.perf_counter(), time.process_time()
        for _ in range(ROUNDS_OF_CLOCK):
            measure(task, zstd_level, Path(folder))
        seconds, cores = time.perf_counter() - started, (time.process_time() - busy)
        queue.put((ROUNDS_OF_CLOCK * task.num_tokens / seconds, cores / seconds))


def main(
    tokens: Annotated[int, typer.Option(help="of each task")] = 40_000,
    rounds: Annotated[int, typer.Option(help="timed rounds; the median counts")] = 3,
    processes: Annotated[int, typer.Option(help="at once, beside one alone; 0 leaves this out")] = 2,
    tokenizers: Annotated[str, typer.Option(help="with commas between")] = ",".join(TOKENIZERS),
    zstd_level: Annotated[int, typer.Option(help="of a shard; the recipes' default is 15")] = 15,
) -> None:
    """Print a table of steps, and of tokens per second."""
    torch.set_num_threads(1)
    rows: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tokenizers.split(","):
            for document_bytes in DOCUMENT_BYTES:
                task = make_task(name, document_bytes, tokens)
                measure(task, zstd_level, Path(folder))  # compiles
                found = [measure(task, zstd_level, Path(folder)) for _ in range(rounds)]
                row = {step: median(of[step] for of in found) for step in found[0]}
                rows[name, document_bytes] = row | {"columns": len(task.vocabulary.order)}
    steps = [step for step in next(iter(rows.values())) if step != "columns"]
    print("microseconds of CPU time a token\n")
    print(f"| tokenizer | columns | bytes a document | {' | '.join(steps)} |")
    print("| --- " * (3 + len(steps)) + "|")
    for (name, document_bytes), row in rows.items():
        values = " | ".join(f"{row[step]:.2f}" for step in steps)
        print(f"| {name} | {int(row['columns']):,} | {document_bytes:,} | {values} |")
    if processes:
        print()
        for _ in range(rounds):  # in turns: the machine's speed varies
            counts = (1, processes)
            found = [throughput(tokenizers.split(",")[0], 2000, tokens, zstd_level, count) for count in counts]
            for count, (rate, cores) in zip(counts, found, strict=True):
                share = rate / found[0][0]
                print(f"{count} processes: {rate:,.0f} tokens/s, {share:.2f} times one; {cores:.2f} cores each")


if __name__ == "__main__":
    typer.run(main)
