"""Throughput of a dump beside vLLM's own prefill and beside `prompt_logprobs=64`, in one run, rounds interleaved.

    .venv/bin/python -m tests.bench.dump_speed [--documents 48] [--tokens 512] [--rounds 3]

Each row is the median over the rounds of teacher tokens per second. The engines live one at a time, in a process each, because
vLLM does not give its memory back; the rounds go over the processes in turn.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

MODES = ("prefill", "hidden", "prompt_logprobs_64", "dump")


def documents(recipe: Any, num_documents: int, num_tokens: int) -> list[str]:
    """Texts of about `num_tokens` teacher tokens, cut from the recipe's corpus joined together."""
    from pipeline.corpus import Corpus

    text = "\n\n".join(d.text.decode() for d in Corpus(recipe.corpus).documents())
    size = int(num_tokens * 4.3)
    return [text[i * size : (i + 1) * size] for i in range(min(num_documents, len(text) // size))]


def measure(mode: str, recipe_path: str, num_documents: int, num_tokens: int, rounds: int) -> list[float]:
    """Tokens per second of each round after one warm-up."""
    from pipeline.recipe import load_recipe
    from pipeline.source import resolve_model
    from pipeline.tokenizer_bytes import ByteTokenizer

    recipe = load_recipe(recipe_path, ["corpus.limit=2000", "teacher.max_tokens=1024"])
    model = resolve_model(recipe.teacher.model)
    tokenizer = ByteTokenizer.load(model)
    texts = documents(recipe, num_documents, num_tokens)
    prompts = [[0, *tokenizer.encode(text.encode())][:1023] for text in texts]
    run = {"dump": _dump, "hidden": _hidden}.get(mode, _generate)(mode, recipe, model, tokenizer, texts, prompts)
    total = sum(map(len, prompts))
    run()
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        rates.append(total / (time.perf_counter() - started))
    return rates


def _dump(mode: str, recipe: Any, model: str, tokenizer: Any, texts: list[str], prompts: list[list[int]]) -> Any:
    from pipeline.corpus import Document
    from pipeline.progress import Progress
    from schemas.manifest import ShardPlan
    from schemas.shard import commit_shard
    from stage1_teacher.dump import make_shard, open_teacher

    teacher = open_teacher(recipe, model, tokenizer)
    shard = ShardPlan(index=0, first_document=0, num_documents=len(texts), num_bytes=sum(map(len, texts)), sha256="")
    batch = [Document(doc_id=str(i), text=text.encode(), messages=None) for i, text in enumerate(texts)]
    folder = Path(tempfile.mkdtemp())

    def run() -> None:
        with Progress(len(batch), shard.num_bytes) as progress:
            table = make_shard(shard, batch, teacher, recipe, {}, progress)
            commit_shard(table, folder / "part-00000.parquet", recipe.dump.zstd_level)

    return run


def _hidden(mode: str, recipe: Any, model: str, tokenizer: Any, texts: list[str], prompts: list[list[int]]) -> Any:
    from stage1_teacher.engine import open_engine

    engine = open_engine(model, recipe.teacher, recipe.placement)
    return lambda: engine.hidden_states(prompts)


def _generate(mode: str, recipe: Any, model: str, tokenizer: Any, texts: list[str], prompts: list[list[int]]) -> Any:
    from stage1_teacher.engine_vllm import generate_engine

    logprobs = 64 if mode == "prompt_logprobs_64" else None
    generate = generate_engine(model, recipe.teacher, recipe.placement, logprobs)
    return lambda: generate(prompts)


def main(
    recipe: str = "pipeline/recipes/demo.yaml",
    documents: Annotated[int, typer.Option(help="documents")] = 32,
    tokens: Annotated[int, typer.Option(help="teacher tokens per document, about")] = 512,
    rounds: Annotated[int, typer.Option(help="timed rounds, each over all modes")] = 3,
    mode: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table of teacher tokens per second."""
    if mode:
        print("RATES " + json.dumps(measure(mode, recipe, documents, tokens, 1)))
        return
    rates: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(rounds):
        for name in MODES:
            command = [sys.executable, "-m", "tests.bench.dump_speed", "--mode", name, "--recipe", recipe]
            command += ["--documents", str(documents), "--tokens", str(tokens)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("RATES "))
            rates[name] += json.loads(line.removeprefix("RATES "))
    floor = statistics.median(rates["prefill"])
    print("| what | tokens/s (median) | share of prefill | rounds |\n| --- | --- | --- | --- |")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {median / floor:.2f} | {', '.join(f'{v:.0f}' for v in values)} |")


if __name__ == "__main__":
    typer.run(main)
