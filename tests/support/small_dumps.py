"""Synthetic dumps and recipes for the student's tests: real files of the schema, made-up distributions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Recipe
from schemas import END, NUM_SYMBOLS
from schemas.manifest import Manifest, ShardPlan
from schemas.record import Record, Segment
from schemas.shard import commit_shard, to_table
from tests.support.tiny import tiny_model

WORDS = ["the", "and", "river", "in", "a", "thing", "stone", "café", "ran", "under", "7", "hills."]


def make_text(rng: np.random.Generator, num_words: int) -> bytes:
    return " ".join(rng.choice(WORDS, num_words)).encode()


def make_record(
    doc_id: str, document: bytes, rng: np.random.Generator, segments: Sequence[Segment] | None = None, top_k: int = 4
) -> Record:
    """Draw random entries that hold the realised symbol and sum to less than 1."""
    chosen = (Segment(0, len(document), True),) if segments is None else tuple(segments)
    realised = b"".join(document[s.start : s.start + s.length] + (b"\xff" if s.has_end else b"") for s in chosen)
    symbols, logprobs = [], []
    for symbol in realised:
        others = rng.permutation([c for c in range(NUM_SYMBOLS) if c != symbol])[: top_k - 1]
        probs = np.sort(rng.dirichlet(np.ones(top_k + 1))[:top_k])[::-1]
        symbols.append(np.array([symbol, *others], dtype=np.uint8))
        logprobs.append(np.log(np.maximum(probs, 1e-4)).astype(np.float32))
    count = len(realised)
    return Record(
        doc_id=doc_id,
        window_start=0,
        document=document,
        segments=chosen,
        teacher_token_lengths=np.ones(len(document), dtype=np.int32),
        teacher_token_logprobs=np.full(len(document), -1.0, dtype=np.float32),
        entry_counts=np.full(count, top_k, dtype=np.uint16),
        dropped=np.zeros(count, dtype=np.float32),
        token_end=rng.choice([0.0, 0.0, 0.2], count).astype(np.float32),
        doubt=np.zeros(count, dtype=np.float32),
        symbols=np.concatenate(symbols),
        logprobs=np.concatenate(logprobs),
    )


def make_dump(folder: Path, num_records: int = 24, num_shards: int = 3, seed: int = 0, teacher: str = "t") -> Path:
    rng = np.random.default_rng(seed)
    records = [make_record(f"d{i}", make_text(rng, int(rng.integers(3, 12))), rng) for i in range(num_records)]
    (folder / "shards").mkdir(parents=True)
    per_shard = num_records // num_shards
    identity = {"teacher": {"model": teacher}}
    plans = tuple(
        ShardPlan(index=i, first_document=i * per_shard, num_documents=per_shard, num_bytes=0, sha256=f"{seed}-{i}")
        for i in range(num_shards)
    )
    Manifest(identity=identity, corpus_counts={"used": num_records}, shards=plans).save(folder)
    for i, plan in enumerate(plans):
        commit_shard(to_table(records[i * per_shard : (i + 1) * per_shard], identity), plan.path(folder), 3)
    return folder


def make_recipe(dump: Path, model: Path, run: Path, train: dict[str, Any], **student: Any) -> Recipe:
    values = {
        "steps": 6, "batch_tokens": 120, "micro_batch_tokens": 60, "lr": 1e-3, "warmup_steps": 2, "save_every": 2,
        "dtype": "float32", "max_tokens": 512, "objectives": {"ce": 1.0, "byte_ce": 1.0, "kl": 0.1, "alm": 10.0},
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "corpus": {"source": "none.jsonl"},
            "teacher": {"model": "/nonexistent/teacher"},
            "dump": {"path": str(dump)},
            "student": {"model": str(model), "path": str(run), "interface": "linear", **student},
            "train": values | train,
        }
    )


__all__ = ["END", "make_dump", "make_recipe", "make_record", "make_text"]


def recipe_in(folder: Path, **train: Any) -> Recipe:
    """Make a recipe whose dump, model and run are in this folder."""
    return make_recipe(folder / "dump", folder / "model", folder / "run", train)


def make_work(folder: Path) -> Path:
    """Make a model, `model`, and a dump of 60 records in 5 shards, `dump`."""
    tiny_model(folder / "model")
    make_dump(folder / "dump", num_records=60, num_shards=5)
    return folder
