"""Throughput of a dump beside vLLM's own prefill and beside `prompt_logprobs=64`, in one run, rounds interleaved.

    .venv/bin/python -m tests.bench.dump_speed [--documents 32] [--tokens 512] [--rounds 3] [--dtypes bfloat16,float32]

Prints, for each dtype: teacher tokens per second of each mode, their ratios to the floor, and two controls that any
figure of fidelity is read against: the same teacher asked twice in other batches, and its logits rounded to bfloat16 as
vLLM rounds them for text that it writes.

The floor is the bare forward in which vLLM's worker applies the head at every position and throws the logits away.
vLLM does not give its memory back, so each engine lives in a process of its own; all of them stay up, and in each round
every mode has one turn.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.runtime.child_processes import end_children_with_me
from tests.bench.dump_controls import dense_alone, dense_targets, divergence
from tests.bench.dump_task import Task
from tests.bench.pages import show

GENERATE = ("prefill", "prompt_logprobs_64_flat", "prompt_logprobs_64")
ROUNDED, POOLING = ("head", "dump"), ("trunk", "head", "dump", "dump_overlapped")
TURNS = [
    *(("generate", mode) for mode in GENERATE),
    *(("model", mode) for mode in ROUNDED),
    *(("float32", mode) for mode in POOLING),
]
MEANING = {
    ("generate", "prefill"): "vLLM's own prefill (one-token generate: the head once a document)",
    ("generate", "prompt_logprobs_64_flat"): "`prompt_logprobs=64` as flat lists (truncated)",
    ("generate", "prompt_logprobs_64"): "`prompt_logprobs=64` as Python objects (truncated)",
    ("model", "head"): "every position's logits in the teacher's dtype, thrown away",
    ("model", "dump"): "the dump with `teacher.head_dtype: model`",
    ("float32", "trunk"): "one row a document reduced: the trunk",
    ("float32", "head"): "every position's logits in float32, thrown away: **the floor**",
    ("float32", "dump"): "the dump: whole softmax, covering, shard written",
    ("float32", "dump_overlapped"): "the dump with `placement.overlap`: the engine a batch ahead",
}
FLOOR = ("float32", "head")
Modes = tuple[dict[str, Callable[["Task"], float]], dict[str, Callable[["Task"], Any]]]


def serve(kind: str, task: Task) -> None:
    """Warm up each mode, then answer each line of the input, the name of a mode or report, with one line of JSON."""
    modes, reports = generate_modes(task) if kind == "generate" else pooling_modes(task, kind)
    for rate in modes.values():
        rate(task.small())
    answers = modes | reports
    print("ANSWER " + json.dumps({"tokens": task.num_tokens, "bytes": task.num_bytes}), flush=True)
    for line in sys.stdin:
        print("ANSWER " + json.dumps(answers[line.strip()](task)), flush=True)


def timed(run: Callable[[Task], Any]) -> Callable[[Task], float]:
    def rate(task: Task) -> float:
        started = time.perf_counter()
        run(task)
        return task.num_tokens / (time.perf_counter() - started)

    return rate


def generate_modes(task: Task) -> Modes:
    from stage1_teacher.engines.vllm import generate_engine

    generate = generate_engine(task.model, task.recipe.teacher, task.recipe.placement, 64)
    return {
        "prefill": timed(lambda task: generate(task.prompts, None, False)),
        "prompt_logprobs_64_flat": timed(lambda task: generate(task.prompts, 64, True)),
        "prompt_logprobs_64": timed(lambda task: generate(task.prompts, 64, False)),
    }, {}


def pooling_modes(task: Task, head_dtype: str) -> Modes:
    from stage1_teacher.targets.opening import open_teacher

    config = task.recipe.teacher.model_copy(update={"head_dtype": head_dtype})
    teacher = open_teacher(task.recipe.with_values(teacher=config), task.model, task.tokenizer)

    modes = {
        "trunk": timed(lambda task: trunk(task, teacher)),
        "head": timed(lambda task: teacher.engine._encode(task.prompts, [None] * len(task.prompts))),  # type: ignore[union-attr]
        "dump": timed(lambda task: dump(task, teacher, overlap=False)),
        "dump_overlapped": timed(lambda task: dump(task, teacher, overlap=True)),
    }
    return modes, {"dense": lambda task: dense_targets(task, teacher), "alone": lambda task: dense_alone(task, teacher)}


def trunk(task: Task, teacher: Any) -> None:
    """Compute all tokens of the documents, and one row of each."""
    import numpy as np

    from stage1_teacher.reduction.types import RowsAlong

    one, none = np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64)
    requests = [[RowsAlong(len(prompt) - 1, b"", one, none)] for prompt in task.prompts]
    teacher.engine.reduced_rows(task.prompts, requests)


def dump(task: Task, teacher: Any, overlap: bool) -> None:
    """Dump a text, up to the committed shard."""
    from pipeline.corpus.documents import Document
    from schemas.manifest import ShardPlan
    from stage1_teacher.dump.shard_writer import make_shards

    plan = ShardPlan(index=0, first_document=0, num_documents=len(task.texts), num_bytes=task.num_bytes, sha256="")
    documents = [Document(doc_id=str(i), text=text, messages=None) for i, text in enumerate(task.texts)]
    placement = task.recipe.placement.model_copy(update={"overlap": overlap})
    recipe = task.recipe.with_values(placement=placement)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shards").mkdir()
        for _ in make_shards([(plan, documents)], teacher, recipe, {}, Path(folder)):
            pass


class Server:
    """A process that holds one engine and waits for its turns."""

    def __init__(self, kind: str, dtype: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "tests.bench.dump_speed", "--serve", kind, "--dtypes", dtype, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.size = self._answer()

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the benchmark's process ended with {self._process.wait()}; its messages are above")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure_and_print(dtype: str, arguments: list[str], rounds: int, save: str) -> None:
    servers = {kind: Server(kind, dtype, arguments) for kind in ("generate", "float32", "model")}
    rates: dict[tuple[str, str], list[float]] = {turn: [] for turn in TURNS}
    for number in range(rounds):
        for turn in TURNS:
            rates[turn].append(servers[turn[0]].ask(turn[1]))
            said = f"{dtype}, round {number + 1}: {' '.join(turn)} {rates[turn][-1]:.0f} tokens/s"
            print(said, file=sys.stderr, flush=True)
    dense, alone, rounded = (
        servers["float32"].ask("dense"),
        servers["float32"].ask("alone"),
        servers["model"].ask("dense"),
    )
    for server in servers.values():
        server.close()
    print_speed(dtype, servers["float32"].size, rates, save)
    found = {
        "asked again, each document alone in its batch": divergence(dense, alone),
        "`teacher.head_dtype: model`": divergence(dense, rounded),
    }
    print("\n| control, nats per position | " + " | ".join(next(iter(found.values()))) + " |")
    print("| --- " * 5 + "|")
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.2e}" for value in values.values()) + " |", flush=True)


def print_speed(dtype: str, size: dict[str, int], rates: dict[tuple[str, str], list[float]], save: str) -> None:
    print(f"\n**{dtype}**, {size['tokens']} tokens, {size['bytes']} bytes\n")
    rows = [
        {
            f"what, {dtype}": MEANING[turn],
            "tokens/s": round(statistics.median(values)),
            "share of the floor": round(_ratio(values, rates[FLOOR]), 2),
            "rounds": [round(value) for value in values],
        }
        for turn, values in rates.items()
    ]
    show(rows, save, "rows" if dtype == "bfloat16" else dtype, documents=f"{size['tokens']} teacher tokens")
    for other in (("model", "head"), ("generate", "prompt_logprobs_64_flat"), ("generate", "prompt_logprobs_64")):
        print(f"\ndump / {MEANING[other]}: {_ratio(rates['float32', 'dump'], rates[other]):.2f}")
    rounded = _ratio(rates["model", "dump"], rates["model", "head"])
    print(f"\nthe dump in the teacher's dtype / its own floor: {rounded:.2f}")


def _ratio(ones: list[float], others: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    documents: Annotated[int, typer.Option(help="documents")] = 32,
    tokens: Annotated[int, typer.Option(help="teacher tokens per document, about")] = 512,
    rounds: Annotated[int, typer.Option(help="timed rounds, each over all modes")] = 3,
    dtypes: Annotated[str, typer.Option(help="of the teacher, with commas between")] = "bfloat16,float32",
    save: Annotated[str, typer.Option(help="Keep the table as tests/bench/results/SAVE.json.")] = "",
    serve_kind: Annotated[str, typer.Option("--serve", hidden=True)] = "",
) -> None:
    """Print tables of teacher tokens per second, of what a dump costs beyond them, and of the controls."""
    end_children_with_me()
    if serve_kind:
        serve(serve_kind, Task(recipe, dtypes, documents, tokens))
        return
    arguments = ["--recipe", recipe, "--documents", str(documents), "--tokens", str(tokens)]
    for dtype in dtypes.split(","):
        measure_and_print(dtype, arguments, rounds, save)


if __name__ == "__main__":
    typer.run(main)
