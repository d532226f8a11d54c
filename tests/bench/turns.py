"""Trainers side by side, each in a process of its own, taking turns step by step.

So a machine that drifts treats them alike.

The parent writes a line to a worker, which takes one step of its own training loop, whatever belongs to it, and writes
its figures.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import IO, Any

import numpy as np
import torch

from pipeline.config import Objectives, Recipe
from pipeline.config.loading import load_recipe
from pipeline.config.transfer import TransferConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, Segment
from schemas.shard import commit_shard, read_shard, to_table
from stage2_student.training import loop
from stage2_student.training.train import train
from tests.bench.interfaces import Figures, peak_bytes, reset_peak
from tests.bench.pages import show

FOREVER = 10**6  # steps; a worker ends when its parent has seen enough
OBJECTIVES = {
    "token_marginal": Objectives(ce=0.3, byte_ce=0.0, kl=1.0),  # the demo's
    "linear": Objectives(ce=1.0, byte_ce=1.0, kl=0.1),  # the paper's
    "causal": Objectives(ce=1.0, byte_ce=1.0, kl=0.1),
}
_FIGURES = "BLD_BENCH_FIGURES"  # names the pipe to the parent, by its number
RATIOS = ("time of a step", "CPU time", "peak memory")  # of `Figures`
_SHARES = ("dropped", "token_end", "doubt")


class Turn:
    """The worker's side of the exchange."""

    def __init__(self) -> None:
        self._to_parent = os.fdopen(int(os.environ[_FIGURES]), "w")
        self._started: tuple[float, float] | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wait(self) -> None:
        """Report the previous step's cost and wait for our turn; called where a step begins.

        The process ends with its parent.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: Sequence[float] = ()
        if self._started is not None:
            wall, cpu = self._started
            found = Figures(time.monotonic() - wall, time.process_time() - cpu, peak_bytes(self._device))
        print(json.dumps(found), file=self._to_parent, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        reset_peak(self._device)
        self._started = time.monotonic(), time.process_time()


def train_in_turns(recipe: Recipe) -> None:
    """Run the real trainer, which waits before each step.

    A step lasts from one optimizer step to the next, including making its batch.
    """
    turn, take_step = Turn(), loop.take_step

    def paced(*arguments: Any) -> Any:
        turn.wait()
        return take_step(*arguments)

    loop.take_step = paced  # type: ignore[assignment]
    train(recipe)


class Worker:
    """The parent's side of the exchange; made when the worker is ready for its first step."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        read, write = os.pipe()
        self._figures = os.fdopen(read)
        # Figures have a pipe of their own, for anything may print to stdout; such output goes to stderr.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sys.stderr, text=True,
            pass_fds=[write], env={**os.environ, _FIGURES: str(write)},
        )  # fmt: skip
        os.close(write)
        self._read()

    def step(self) -> Figures:
        self._to_worker.write("\n")
        self._to_worker.flush()
        return Figures(*self._read())

    def close(self) -> None:
        self._to_worker.close()
        self._process.wait()
        self._figures.close()

    def _read(self) -> Sequence[float]:
        line = self._figures.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        return list(json.loads(line))

    @property
    def _to_worker(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin


def compare(module: str, arguments: Mapping[str, Sequence[str]], rounds: int, tokens: int, save: str) -> None:
    """Print a line for each worker; ratios are medians of each round's own to the first one, with their range.

    Args:
        arguments: of `python -m module`, for each worker by its name.
        tokens: of a step.
        save: name of the file of results that keeps the lines; empty: none.
    """
    workers: list[Worker] = []
    random = Random(0)
    steps: dict[str, list[Figures]] = {name: [] for name in arguments}
    try:
        for name, own in arguments.items():
            workers.append(Worker(name, [sys.executable, "-m", module, *own]))
        for number in range(rounds + 2):
            # In another order each time: each step starts with the memory and caches that the last one left.
            for worker in random.sample(workers, len(workers)):
                found = worker.step()
                print(f"round {number}: {worker.name} {found.seconds:.2f} s", file=sys.stderr, flush=True)
                if number > 1:  # the first steps compile and fill caches
                    steps[worker.name].append(found)
    finally:
        for worker in workers:
            worker.close()
    _report(steps, tokens, save)


def _report(steps: Mapping[str, Sequence[Figures]], tokens: int, save: str) -> None:
    floor = next(iter(steps.values()))
    print(f"{tokens} tokens a step, medians of {len(floor)} rounds")
    rows: list[dict[str, Any]] = []
    for name, own in steps.items():
        seconds, cpu, memory = (statistics.median(values) for values in zip(*own, strict=True))
        ratios = [
            [a / b for a, b in zip(values, base, strict=True)]
            for values, base in zip(zip(*own, strict=True), zip(*floor, strict=True), strict=True)
        ]
        measured = {"tokens/s": (tokens / seconds, 0), "step, s": (seconds, 2), "CPU, s": (cpu, 1)}
        measured |= {"peak memory, GiB": (memory / 2**30, 2)}
        row = {"trainer": name, **{heading: round(value, digits) for heading, (value, digits) in measured.items()}}
        for what, of_rounds in zip(RATIOS, ratios, strict=True):
            row[f"{what}, times the first"] = (
                f"{statistics.median(of_rounds):.2f} ({min(of_rounds):.2f}-{max(of_rounds):.2f})"
            )
        rows.append(row)
    show(rows, save)


def equal_documents(source: Path, folder: Path, tokenizer: ByteTokenizer, tokens: int) -> Path:
    """Write a dump of documents of that many tokens each, from the text and targets of another.

    The start token is one of them.

    Batches of them need no padding, so that any trainer can be given the same.
    """
    records: list[Record] = []
    joined: list[Record] = []
    for shard in Manifest.load(source).shards:
        for record in read_shard(shard.path(source)):
            joined.append(record)
            if (cut := _cut(joined, tokenizer, tokens - 1)) is not None:
                records.append(replace(cut, doc_id=str(len(records))))
                joined = []
    plan = ShardPlan(index=0, first_document=0, num_documents=len(records), num_bytes=0, sha256="")
    (folder / "shards").mkdir(parents=True)
    Manifest(identity={}, corpus_counts={}, shards=(plan,)).save(folder)
    commit_shard(to_table(records, {}), plan.path(folder), zstd_level=3)
    return folder


def _cut(records: Sequence[Record], tokenizer: ByteTokenizer, tokens: int) -> Record | None:
    """Join records as far as that many tokens spell them; None if they are too short."""
    text = b"".join(record.document for record in records)
    ids = tokenizer.encode(text)
    for cut in range(tokens, len(ids)):
        document = b"".join(tokenizer.token_bytes[token] or b"" for token in ids[:cut])[len(tokenizer.prefix) :]
        found = tokenizer.encode_batch([document])[0]
        if isinstance(found, list) and len(found) == tokens:
            return _first_bytes(records, document)
    return None


def _first_bytes(records: Sequence[Record], document: bytes) -> Record:
    """Make one record of `document`, with their targets in turn; no END is asked for."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("entry_counts", *_SHARES, "symbols", "logprobs")}
    left = len(document)
    for record in records:
        count = min(left, len(record.document))
        entries = int(record.entry_counts[:count].sum(dtype=np.int64))
        for name, parts in found.items():
            parts.append(getattr(record, name)[: entries if name in ("symbols", "logprobs") else count])
        left -= count
    return replace(
        records[0],
        document=document,
        segments=(Segment(0, len(document), False),),
        teacher_token_lengths=np.array([len(document)], dtype=np.int32),
        teacher_token_logprobs=np.zeros(1, dtype=np.float32),
        **{name: np.concatenate(parts) for name, parts in found.items()},
    )


def trainer_recipe(dump: Path, out: Path, name: str, tokens: int, documents: int) -> Recipe:
    """Configure the demo's student on such a dump.

    One micro-batch a step, nothing made ahead, nothing saved.

    Args:
        name: of an interface; `sft` for cross-entropy alone.
        tokens: of a document.
    """
    recipe = load_recipe(Path("pipeline/recipes/demo.yaml"))
    interface = {"interface": name} if name != "sft" else {}
    objectives = Objectives(ce=1.0, byte_ce=0.0, kl=0.0) if name == "sft" else OBJECTIVES[name]
    assert recipe.student is not None
    # Rows that take no hours to make: a step costs the same whatever they hold.
    rows = TransferConfig(input="mean", output="mean")
    student = recipe.student.model_copy(update={"path": str(out / name), "dumps": (), "transfer": rows, **interface})
    train_values = {
        "steps": FOREVER, "save_every": FOREVER,
        "batch_tokens": documents * tokens, "micro_batch_tokens": documents * tokens,
        "max_tokens": tokens, "prefetch": 0, "eval_every": 0, "objectives": objectives,
    }  # fmt: skip
    return recipe.with_values(
        student=student,
        dump=recipe.dump.model_copy(update={"path": str(dump)}),
        train=recipe.train.model_copy(update=train_values),
    )
