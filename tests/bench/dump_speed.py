"""Throughput of a dump beside vLLM's own prefill and beside `prompt_logprobs=64`, in one run, rounds interleaved.

    .venv/bin/python -m tests.bench.dump_speed [--documents 32] [--tokens 512] [--rounds 3] [--dtypes bfloat16,float32]

Prints, for each dtype: teacher tokens per second of each mode, their ratios to the floor, where the dump's time beyond
the head goes, and two controls that any figure of fidelity is read against: the same teacher asked twice in other
batches, and its logits rounded to bfloat16 as vLLM rounds them.

The floor is the bare forward that also applies the head at every position and throws the logits away. vLLM does not
give its memory back, so each engine lives in a process of its own; all of them stay up, and in each round every mode
has one turn.
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
from tests.bench.dump_profile import controls, profile
from tests.bench.dump_task import Task

GENERATE = ("prefill", "prompt_logprobs_64_flat", "prompt_logprobs_64")
POOLING = ("hidden", "hidden_head_rounded", "hidden_head", "dump", "dump_overlapped")
MEANING = {
    "prefill": "vLLM's own prefill (one-token generate: the head once a document)",
    "prompt_logprobs_64_flat": "`prompt_logprobs=64` as flat lists (truncated)",
    "prompt_logprobs_64": "`prompt_logprobs=64` as Python objects (truncated)",
    "hidden": "hidden states through the pooling API",
    "hidden_head_rounded": "hidden states + head, the product and its result in the teacher's dtype",
    "hidden_head": "hidden states + head, the result in float32: **the floor**",
    "dump": "the dump: whole softmax, covering, shard written",
    "dump_overlapped": "the dump with `placement.overlap`: the engine a batch ahead",
}
Modes = tuple[dict[str, Callable[["Task"], float]], dict[str, Callable[["Task"], Any]]]


def serve(kind: str, task: Task) -> None:
    """Warm up each mode, then answer each line of the input, the name of a mode or report, with one line of JSON."""
    modes, reports = generate_modes(task) if kind == "generate" else pooling_modes(task)
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


def pooling_modes(task: Task) -> Modes:
    import torch

    from stage1_teacher.targets.opening import open_teacher

    teacher = open_teacher(task.recipe, task.model, task.tokenizer)
    head = teacher.reducer.head
    rounded_CD = head.weight_CD.to(getattr(torch, task.recipe.teacher.dtype))
    room: dict[int, torch.Tensor] = {}

    def hidden(task: Task) -> list[torch.Tensor]:
        return teacher.engine.hidden_states(task.prompts)

    def head_rounded(task: Task) -> None:
        for part_RD in torch.cat(hidden(task)).to(rounded_CD).split(256):
            out_RC = room.setdefault(len(part_RD), rounded_CD.new_empty(len(part_RD), len(rounded_CD)))
            torch.mm(part_RD, rounded_CD.T, out=out_RC)

    def head_float32(task: Task) -> None:
        for part_RD in torch.cat(hidden(task)).split(256):
            head.logits(part_RD)

    modes = {
        "hidden": timed(hidden),
        "hidden_head_rounded": timed(head_rounded),
        "hidden_head": timed(head_float32),
        "dump": timed(lambda task: dump(task, teacher, overlap=False)),
        "dump_overlapped": timed(lambda task: dump(task, teacher, overlap=True)),
    }
    return modes, {"profile": lambda task: profile(task, teacher), "controls": lambda task: controls(task, teacher)}


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


def measure_and_print(dtype: str, arguments: list[str], rounds: int) -> None:
    servers = {"generate": Server("generate", dtype, arguments), "pooling": Server("pooling", dtype, arguments)}
    turns = [("generate", mode) for mode in GENERATE] + [("pooling", mode) for mode in POOLING]
    rates: dict[str, list[float]] = {mode: [] for _, mode in turns}
    for number in range(rounds):
        for kind, mode in turns:
            rates[mode].append(servers[kind].ask(mode))
            print(f"{dtype}, round {number + 1}: {mode} {rates[mode][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    profiles = [servers["pooling"].ask("profile") for _ in range(3)]
    found = servers["pooling"].ask("controls")
    for server in servers.values():
        server.close()
    print_speed(dtype, servers["pooling"].size, rates)
    print_profile({name: statistics.median(p[name] for p in profiles) for name in profiles[0]})
    print("\n| control, nats per position | " + " | ".join(next(iter(found.values()))) + " |")
    print("| --- " * 5 + "|")
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.2e}" for value in values.values()) + " |", flush=True)


def print_speed(dtype: str, size: dict[str, int], rates: dict[str, list[float]]) -> None:
    print(f"\n**{dtype}**, {size['tokens']} tokens, {size['bytes']} bytes\n")
    print(
        "| what | tokens/s (median) | share of the floor, round by round (median) | rounds |\n| --- | --- | --- | --- |"
    )
    for mode, values in rates.items():
        share = statistics.median(a / b for a, b in zip(values, rates["hidden_head"], strict=True))
        each = ", ".join(f"{value:.0f}" for value in values)
        print(f"| {MEANING[mode]} | {statistics.median(values):.0f} | {share:.2f} | {each} |")
    for other in ("hidden_head_rounded", "prompt_logprobs_64_flat", "prompt_logprobs_64"):
        ratio = statistics.median(a / b for a, b in zip(rates["dump"], rates[other], strict=True))
        print(f"\ndump / {other}: {ratio:.2f}")


def print_profile(spent: dict[str, float]) -> None:
    print("\n| beyond the hidden states | microseconds/token |\n| --- | --- |")
    for name, value in spent.items():
        if name != "ranges per row":
            print(f"| {name} | {value:.1f} |")
    floor = sum(value for name, value in spent.items() if name.startswith("floor"))
    print(
        f"\n{spent['ranges per row']:.0f} ranges per row; softmax and range sums take "
        f"{spent['softmax and range sums'] / floor:.1f} x their floor of {floor:.1f}"
    )


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    documents: Annotated[int, typer.Option(help="documents")] = 32,
    tokens: Annotated[int, typer.Option(help="teacher tokens per document, about")] = 512,
    rounds: Annotated[int, typer.Option(help="timed rounds, each over all modes")] = 3,
    dtypes: Annotated[str, typer.Option(help="of the teacher, with commas between")] = "bfloat16,float32",
    serve_kind: Annotated[str, typer.Option("--serve", hidden=True)] = "",
) -> None:
    """Print tables of teacher tokens per second, of what a dump costs beyond them, and of the controls."""
    end_children_with_me()
    if serve_kind:
        serve(serve_kind, Task(recipe, dtypes, documents, tokens))
        return
    arguments = ["--recipe", recipe, "--documents", str(documents), "--tokens", str(tokens)]
    for dtype in dtypes.split(","):
        measure_and_print(dtype, arguments, rounds)


if __name__ == "__main__":
    typer.run(main)
