"""Checks and figures on a GPU, in ten minutes: one line of JSON each, and a log.

    .venv/bin/python -m tests.bench.gpu [--out runs/gpu] [--only tests,kernel,marginal,runner-v1,...]

Every step is a process of its own with a share of the time; one that fails or is late is said, and the rest go on:

- `tests`: the kernels and the sums on the device against float64, and the pooler under Model Runner V2's code;
- `kernel`: the row reduction beside a copy's bandwidth, 1,024 rows (the aim: 60 %);
- `marginal`: head and `token_marginal` of 4,096 tokens in 151,936 columns, by Triton and by torch's own operations,
  beside a fused cross-entropy: Liger's where it is installed, and one chunk of torch's (the aim: 1.05 times the time);
- `runner-v1`, `runner-v2`: targets through vLLM under both model runners against transformers' in float32;
- `135m`, `1b`, `8b`: teacher tokens a second of a dump beside vLLM's bare prefill of the same prompts (the aim: 0.9,
  and 0.95 for 8b). `1b` and `8b` have the shapes of Llama 3's models and random weights.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

# Seconds that each step may take; together under ten minutes.
STEPS = {"tests": 90, "kernel": 40, "marginal": 40, "runner-v2": 60, "runner-v1": 60, "135m": 75, "1b": 85, "8b": 140}
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TOKENS, DOCUMENT_TOKENS = {"135m": 400_000, "1b": 200_000, "8b": 100_000}, 500
TESTS = [
    "tests/stage1_teacher/reduction",
    "tests/stage1_teacher/engines/test_vllm_worker.py",
    "tests/stage2_student/interfaces/token_marginal/test_kernel_triton.py",
    "tests/scenarios/test_gpu.py",
]


def shaped_model(shape: str, folder: Path, tokenizer: str) -> Path:
    """Write the config of a model of that shape, with no weights, beside a tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.save_pretrained(folder)
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def speed(shape: str) -> dict[str, Any]:
    """Measure a dump, and vLLM's bare prefill, in this process; vLLM gives its memory back only to the next."""
    from pipeline.corpus.documents import Document
    from schemas.manifest import ShardPlan
    from stage1_teacher.coordination.shard_writers import open_writers
    from stage1_teacher.dump.shard_writer import make_shards
    from stage1_teacher.engines import vllm
    from stage1_teacher.targets import opening
    from tests.bench.dump_task import Task

    task = Task("pipeline/recipes/demo.yaml", "bfloat16", TOKENS[shape] // DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    recipe, model = task.recipe, task.model
    placement = recipe.placement.model_copy(update={"batch_tokens": None, "gpu_memory": 0.6})
    recipe = recipe.with_values(placement=placement)
    found: dict[str, Any] = {"tokens": task.num_tokens, "gpu": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        if shape in SHAPES:
            model = str(shaped_model(shape, folder / "model", task.model))
            usual = vllm.engine_options
            vllm.engine_options = lambda *given, **named: usual(*given, **named) | {"load_format": "dummy"}  # type: ignore[assignment]
            # Random weights are nowhere near a language model; what is timed does not depend on them.
            opening.check_engine = lambda *_: None  # type: ignore[assignment]
        teacher = opening.open_teacher(recipe, model, task.tokenizer)
        documents = [Document(str(i), text, None) for i, text in enumerate(task.texts)]
        plan = ShardPlan(index=0, first_document=0, num_documents=len(documents), num_bytes=task.num_bytes, sha256="")
        writers = open_writers(recipe.placement)
        for number in range(2):  # the first warms up
            started = time.perf_counter()
            path = folder / str(number)
            (path / "shards").mkdir(parents=True)
            for _ in make_shards([(plan, documents)], teacher, recipe, {}, path, writers=writers):
                pass
            found["dump"] = task.num_tokens / (time.perf_counter() - started)
        started = time.perf_counter()
        teacher.engine._encode(task.prompts, [None] * len(task.prompts))  # type: ignore[union-attr]
        found["head, thrown away"] = task.num_tokens / (time.perf_counter() - started)
        writers.close()
        teacher.close()
        generate = vllm.generate_engine(
            model, recipe.teacher, recipe.placement.model_copy(update={"gpu_memory": 0.3}), 1
        )
        generate(task.prompts[:32], None, False)
        started = time.perf_counter()
        generate(task.prompts, None, False)
        found["prefill"] = task.num_tokens / (time.perf_counter() - started)
    return found | {"dump / prefill": found["dump"] / found["prefill"]}


def runner(version: str) -> dict[str, Any]:
    """Compare the targets of some texts through vLLM, under a model runner, with transformers' in float32."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if version == "v2" else "0"
    from pipeline.corpus.documents import Document
    from pipeline.sources.resolve import resolve_model
    from pipeline.tokenization.byte_tokenizer import ByteTokenizer
    from stage1_teacher.inputs.encoded_windows import cut_document
    from stage1_teacher.targets.opening import open_teacher
    from stage1_teacher.targets.records import make_records
    from tests.bench.dump_task import Task

    task = Task("pipeline/recipes/demo.yaml", "bfloat16", 12, 300)
    model = resolve_model(task.recipe.teacher.source).source
    tokenizer = ByteTokenizer.load(model)
    windows = [w for text in task.texts for w in cut_document(Document("", text, None), tokenizer, 1024, 0)]
    dense, sparse, ran = {}, {}, ""
    for engine, dtype in (("transformers", "float32"), ("vllm", "bfloat16")):
        config = task.recipe.teacher.model_copy(update={"engine": engine, "dtype": dtype})
        recipe = task.recipe.with_values(teacher=config)
        with open_teacher(recipe, model, tokenizer) as teacher:
            dense[engine] = [t.probs_PV for t in teacher.targets(windows, teacher.run_engine(windows))]
            sparse[engine] = make_records(windows, teacher.run_for_dump(windows, recipe.dump), teacher, recipe.dump)
            ran = getattr(teacher.engine, "runner", ran)
    p_PV, q_PV = (np.maximum(np.concatenate(dense[engine]), 1e-30) for engine in ("transformers", "vllm"))
    same = [np.array_equal(a.entry_counts, b.entry_counts) for a, b in zip(*sparse.values(), strict=True)]
    kl_P = (p_PV * np.log(p_PV / q_PV)).sum(axis=1)
    return {
        "runner": ran,
        "KL": float(kl_P.mean()),
        "largest KL": float(kl_P.max()),
        "same counts": sum(same) / len(same),
    }


def step(name: str) -> dict[str, Any]:
    """Do a step in this process."""
    if name.startswith("runner-"):
        return runner(name.removeprefix("runner-"))
    if name in TOKENS:
        return speed(name)
    modules = {"kernel": ["tests.bench.kernel"], "marginal": ["tests.bench.marginal_kernel"]}
    command = [sys.executable, "-m", *modules.get(name, ["pytest", "-q", *TESTS])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit": ran.returncode, "said": ran.stdout.strip().splitlines()[-12:]}


def main(
    out: Annotated[Path, typer.Option(help="Folder of results.jsonl and of a log for each step.")] = Path("runs/gpu"),
    only: Annotated[str, typer.Option(help="Steps, with commas between.")] = ",".join(STEPS),
    minutes: Annotated[float, typer.Option(help="After which no step is begun.")] = 10.0,
    one: Annotated[str, typer.Option("--step", hidden=True)] = "",
) -> None:
    """Run the steps in turn."""
    if one:
        print("RESULT " + json.dumps(step(one)), flush=True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.gpu needs a GPU, and torch finds none on this machine.")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for name in only.split(","):
        left = end - time.monotonic()
        result: dict[str, Any] = {"step": name}
        if left < STEPS[name] / 2:
            result["not begun"] = f"{left:.0f} s are left"
        else:
            started = time.monotonic()
            log = out / f"{name}.log"
            with log.open("w") as file:
                command = [sys.executable, "-m", "tests.bench.gpu", "--step", name]
                try:
                    ended = subprocess.run(
                        command, stdout=file, stderr=file, timeout=min(left, STEPS[name]), check=False
                    )
                    result["exit"] = ended.returncode
                except subprocess.TimeoutExpired:
                    result["late"] = f"not done in {min(left, STEPS[name]):.0f} s"
            said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("RESULT ")]
            result |= json.loads(said[-1].removeprefix("RESULT ")) if said else {}
            result["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(result), flush=True)
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
