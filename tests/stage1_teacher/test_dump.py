"""The dump through its command line: content, resume after kill -9, refusals, windows, what is left out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from schemas.manifest import Manifest
from schemas.shard import read_shard
from stage1_teacher.verify import realised_logprobs, verify_dump
from tests.tiny import END_OF_TEXT, tiny_model

TEXTS = [f"the thing number {i} and the other thing, é or {'in ' * (i % 7)}{i}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def write_recipe(folder: Path, model: Path, texts: list[str], **dump: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    recipe = {
        "corpus": {"source": str(corpus)},
        "teacher": {
            "model": str(model),
            "engine": "transformers",
            "dtype": "float32",
            "max_tokens": 64,
            "overlap_tokens": 8,
            "start": END_OF_TEXT,
            "end": [END_OF_TEXT],
        },
        "dump": {"path": str(folder / "dump"), "shard_bytes": 200, **dump},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def bld(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def content(dump: Path) -> dict[str, object]:
    return {path.name: pq.read_table(path) for path in sorted((dump / "shards").glob("*.parquet"))}


def test_a_dump_killed_at_any_moment_resumes_to_the_same_content(tmp_path: Path, model: Path) -> None:
    whole = write_recipe(tmp_path / "whole", model, TEXTS)
    assert bld("teacher", str(whole)).returncode == 0
    broken = write_recipe(tmp_path / "broken", model, TEXTS)
    shards = tmp_path / "broken" / "dump" / "shards"
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "teacher", str(broken)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = len(list(shards.glob("*.parquet")))
    assert 0 < made < len(Manifest.load(tmp_path / "broken" / "dump").shards)
    (shards / f"part-99999.{process.pid}.partial").write_bytes(b"half")  # what a kill within a write leaves
    assert bld("teacher", str(broken)).returncode == 0
    assert not list(shards.glob("*.partial"))
    assert content(tmp_path / "broken" / "dump") == content(tmp_path / "whole" / "dump")
    assert verify_dump(tmp_path / "broken" / "dump") == []


def test_two_workers_make_the_same_dump_as_one(tmp_path: Path, model: Path) -> None:
    one, two = write_recipe(tmp_path / "one", model, TEXTS[:12]), write_recipe(tmp_path / "two", model, TEXTS[:12])
    assert bld("teacher", str(one)).returncode == 0
    assert bld("teacher", str(two), "--worker", "0/2").returncode == 0
    assert not (tmp_path / "two" / "dump" / "summary.json").exists()
    assert bld("teacher", str(two), "--worker", "1/2").returncode == 0
    assert content(tmp_path / "one" / "dump") == content(tmp_path / "two" / "dump")


@pytest.mark.parametrize(
    ("override", "field"), [("dump.top_k=3", "sparsity.top_k"), ("teacher.max_tokens=32", "teacher.max_tokens")]
)
def test_a_resume_with_one_field_changed_is_refused_by_name(
    tmp_path: Path, model: Path, override: str, field: str
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    assert bld("teacher", str(recipe)).returncode == 0
    refused = bld("teacher", str(recipe), "-o", override)
    assert refused.returncode == 1
    assert field in refused.stderr + refused.stdout and "Traceback" not in refused.stderr


def test_a_changed_corpus_is_refused(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    assert bld("teacher", str(recipe)).returncode == 0
    write_recipe(tmp_path, model, [*TEXTS[:2], "another"])
    refused = bld("teacher", str(recipe))
    assert refused.returncode == 1 and "corpus.sha256" in refused.stderr + refused.stdout


def test_long_documents_are_cut_and_every_position_is_stored_once(tmp_path: Path, model: Path) -> None:
    text = "the and é " * 60
    recipe = write_recipe(tmp_path, model, [text, "short"])
    assert bld("teacher", str(recipe)).returncode == 0
    records = [r for path in sorted((tmp_path / "dump" / "shards").glob("*.parquet")) for r in read_shard(path)]
    windows = [r for r in records if r.doc_id == records[0].doc_id]
    assert len(windows) > 2
    supervised = b"".join(r.document[s.start : s.start + s.length] for r in windows for s in r.segments)
    assert supervised == text.encode()
    assert [s.has_end for r in windows for s in r.segments] == [False] * (len(windows) - 1) + [True]


def test_stored_entries_decode_to_the_targets_and_the_summary_adds_up(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:4], top_k=256, min_prob=0.0)
    assert bld("teacher", str(recipe)).returncode == 0
    dump = tmp_path / "dump"
    summary = json.loads((dump / "summary.json").read_text(encoding="utf-8"))
    records = [r for path in sorted((dump / "shards").glob("*.parquet")) for r in read_shard(path)]
    assert summary["bytes"] == sum(len(r.document) for r in records) == sum(len(t.encode()) for t in TEXTS[:4])
    for record in records:
        starts = np.cumsum(record.entry_counts) - record.entry_counts
        sums = np.add.reduceat(np.exp(record.logprobs.astype(np.float64)), starts)
        np.testing.assert_allclose(sums, 1, atol=5e-3)
        # At canonical boundaries without a longer token alive, byte log-probabilities chain to the token's.
        assert realised_logprobs(record).sum() == pytest.approx(
            float(record.teacher_token_logprobs.sum()) + realised_logprobs(record)[-1], rel=0.5
        )


def test_verify_against_the_teacher_finds_no_difference(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    assert bld("teacher", str(recipe)).returncode == 0
    assert verify_dump(tmp_path / "dump", against_teacher=2) == []


def test_verify_finds_a_flipped_byte_and_a_missing_shard(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    assert bld("teacher", str(recipe)).returncode == 0
    first, second, *_ = sorted((tmp_path / "dump" / "shards").glob("*.parquet"))
    spoiled = bytearray(first.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    first.write_bytes(bytes(spoiled))
    second.unlink()
    faults = "\n".join(verify_dump(tmp_path / "dump"))
    assert first.name in faults and f"{second}: missing" in faults
