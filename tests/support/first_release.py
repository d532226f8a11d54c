"""A dump and a run that the first release made, kept whole as files: what it began goes on.

    python -m tests.support.first_release CHECKOUT

lets the code in CHECKOUT, a work tree of commit c6908ab, make them in `tests/scenarios/first_release`: a dump of three
shards, and a run of four steps as a kill after its second leaves it. `metrics.jsonl` keeps all four steps, which show
what the rest has to be. Run once; after that the files are history.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny import tiny_tokenizer

KEPT = Path(__file__).parents[1] / "scenarios/first_release"
TEXTS = [f"the thing number {i} and the other thing, é or {'in ' * (i % 7)}{i}" for i in range(9)]
NUM_FIRST = 6  # of the texts, the corpus that the dump began with
RECIPE = """\
corpus: {source: text.jsonl}
teacher: {model: model, engine: transformers, dtype: float32, max_tokens: 64, overlap_tokens: 8}
dump: {path: dump, shard_bytes: 200B}
student: {model: model, tokenizer: tokenizer, path: run, interface: token_marginal}
train: {steps: 4, batch_tokens: 64, max_tokens: 64, dtype: float32, lr: 1.0e-3, warmup_steps: 1, save_every: 2,
        objectives: {ce: 0.3, kl: 1.0}}
"""
_LEFT_BY_THE_REST = ("step-000004", "export", "tensorboard", "launch.yaml", "summary.json", "lock", "latest")


def write_texts(folder: Path, number: int) -> None:
    """Write a corpus of the first texts."""
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[:number])
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")


def main(checkout: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "made"
        folder.mkdir()
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.5,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        tiny_tokenizer(["t h", "a n"]).save_pretrained(folder / "tokenizer")
        write_texts(folder, NUM_FIRST)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        for command in ("teacher", "student"):
            subprocess.run(
                [sys.executable, "-m", "pipeline", command, "recipe.yaml"], cwd=folder, env=environment, check=True
            )
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.copytree(folder, KEPT, ignore=shutil.ignore_patterns("claims.lock"))
    for path in [path for path in (KEPT / "run").rglob("*") if path.name in _LEFT_BY_THE_REST]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
