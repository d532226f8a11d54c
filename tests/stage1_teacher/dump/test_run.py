"""The dump through its command line: content, resume after kill -9, refusals, windows, omissions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config.loading import load_recipe
from schemas.manifest import Manifest
from schemas.record_checks import record_faults
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.reduction.sparsify import sparsify
from stage1_teacher.verification.verify import verify_dump
from tests.support.tiny import END_OF_TEXT

TEXTS = [f"the thing number {i} and the other thing, é or {'in ' * (i % 7)}{i}" for i in range(40)]


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


def dump(recipe: Path, *overrides: str, worker: tuple[int, int] = (0, 1), accept_engine: str | None = None) -> Path:
    """Do what `bld teacher RECIPE` does, in this process; return the dump's folder."""
    run_teacher(load_recipe(recipe, list(overrides)), worker=worker, accept_engine=accept_engine)
    return recipe.parent / "dump"


def content(dump: Path) -> dict[str, object]:
    return {path.name: pq.read_table(path) for path in sorted((dump / "shards").glob("*.parquet"))}


def test_a_dump_killed_at_any_moment_resumes_to_the_same_content(tmp_path: Path, model: Path) -> None:
    whole = write_recipe(tmp_path / "whole", model, TEXTS)
    dump(whole)
    broken = write_recipe(tmp_path / "broken", model, TEXTS)
    shards = tmp_path / "broken" / "dump" / "shards"
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "teacher", str(broken)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600  # of a machine that does much else
    while len(list(shards.glob("*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = len(list(shards.glob("*.parquet")))
    assert 0 < made < len(Manifest.load(tmp_path / "broken" / "dump").shards)
    (shards / f"part-99999.{process.pid}.partial").write_bytes(b"half")  # what a kill within a write leaves
    dump(broken)
    assert not list(shards.glob("*.partial"))
    assert content(tmp_path / "broken" / "dump") == content(tmp_path / "whole" / "dump")
    assert verify_dump(tmp_path / "broken" / "dump") == []


def test_two_workers_make_the_same_dump_as_one(tmp_path: Path, model: Path) -> None:
    one, two = write_recipe(tmp_path / "one", model, TEXTS[:12]), write_recipe(tmp_path / "two", model, TEXTS[:12])
    dump(one)
    dump(two, worker=(0, 2))
    assert not (tmp_path / "two" / "dump" / "summary.json").exists()
    dump(two, worker=(1, 2))
    assert content(tmp_path / "one" / "dump") == content(tmp_path / "two" / "dump")


def test_a_dump_that_overlaps_engine_and_reduction_has_the_same_content(tmp_path: Path, model: Path) -> None:
    plain, overlapped = (
        write_recipe(tmp_path / "plain", model, TEXTS),
        write_recipe(tmp_path / "overlapped", model, TEXTS),
    )
    dump(plain, "placement.overlap=false", "placement.batch_tokens=64")
    dump(overlapped, "placement.overlap=true", "placement.batch_tokens=64")
    assert content(tmp_path / "plain" / "dump") == content(tmp_path / "overlapped" / "dump")


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_reduction_that_fails_ends_the_dump_with_its_error_and_leaves_whole_shards_only(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS)
    calls = iter(range(100))

    def failing(*args: object) -> object:
        if next(calls) == 20:
            raise MemoryError("no room for logits")
        return sparsify(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("stage1_teacher.reduction.sparse_targets.sparsify", failing)
    with pytest.raises(MemoryError, match="no room for logits"):
        dump(recipe, f"placement.overlap={overlap}")
    monkeypatch.undo()
    made = content(tmp_path / "dump")
    assert 0 < len(made) < len(Manifest.load(tmp_path / "dump").shards)
    dump(recipe)
    assert content(tmp_path / "dump").items() >= made.items() and verify_dump(tmp_path / "dump") == []


@pytest.mark.parametrize(
    ("override", "field"), [("dump.top_k=3", "sparsity.top_k"), ("teacher.max_tokens=32", "teacher.max_tokens")]
)
def test_a_resume_with_one_field_changed_is_refused_by_name(
    tmp_path: Path, model: Path, override: str, field: str
) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    dump(recipe)
    with pytest.raises(ValueError, match=f"holds another dump: {field}"):
        dump(recipe, override)


def test_a_changed_corpus_is_refused(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    dump(recipe)
    write_recipe(tmp_path, model, [*TEXTS[:2], "another"])
    with pytest.raises(ValueError, match=r"corpus\.sha256"):
        dump(recipe)


def test_long_documents_are_cut_and_every_position_is_stored_once(tmp_path: Path, model: Path) -> None:
    text = "the and é " * 60
    recipe = write_recipe(tmp_path, model, [text, "short"])
    dump(recipe)
    records = [r for path in sorted((tmp_path / "dump" / "shards").glob("*.parquet")) for r in read_shard(path)]
    windows = [r for r in records if r.doc_id == records[0].doc_id]
    assert len(windows) > 2
    supervised = b"".join(r.document[s.start : s.start + s.length] for r in windows for s in r.segments)
    assert supervised == text.encode()
    assert [s.has_end for r in windows for s in r.segments] == [False] * (len(windows) - 1) + [True]


def test_stored_entries_decode_to_the_targets_and_the_summary_adds_up(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:4], top_k=256, min_prob=0.0)
    folder = dump(recipe)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    records = [r for path in sorted((folder / "shards").glob("*.parquet")) for r in read_shard(path)]
    assert summary["bytes"] == sum(len(r.document) for r in records) == sum(len(t.encode()) for t in TEXTS[:4])
    for record in records:
        assert record_faults(record) == [] and set(record.entry_counts.tolist()) == {256}
        sums = np.exp(record.logprobs.astype(np.float64)).reshape(-1, 256).sum(axis=1)
        np.testing.assert_allclose(sums, 1, atol=5e-3)


def test_a_document_that_the_tokenizer_cannot_spell_is_named_in_the_summary(tmp_path: Path, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "NFC"}
    other = tmp_path / "normalising"
    shutil.copytree(model, other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    folder = dump(write_recipe(tmp_path, other, ["the thing", "e\u0301", "and"]))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["left_out_unspellable"]) == ["1"] and summary["documents"] == 2


def test_a_document_that_no_window_can_hold_is_left_out_by_name_and_the_others_are_dumped(
    tmp_path: Path, model: Path
) -> None:
    texts = [
        "the thing",
        "\U0001f600" * 5,
        "\u00e9 and",
    ]  # an emoji is four tokens here; beside three of context none fits
    folder = dump(write_recipe(tmp_path, model, texts), "teacher.max_tokens=8", "teacher.overlap_tokens=4")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["documents"] == 2 and list(summary["left_out_unspellable"]) == ["1"]
    assert "no window of 7 tokens moves past byte" in summary["left_out_unspellable"]["1"]
    assert verify_dump(folder) == []


def test_verify_against_the_teacher_finds_no_difference(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:3])
    dump(recipe)
    assert verify_dump(tmp_path / "dump", against_teacher=2) == []


def test_verify_finds_a_flipped_byte_and_a_missing_shard(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path, model, TEXTS[:12])
    dump(recipe)
    first, second, *_ = sorted((tmp_path / "dump" / "shards").glob("*.parquet"))
    spoiled = bytearray(first.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    first.write_bytes(bytes(spoiled))
    second.unlink()
    faults = "\n".join(verify_dump(tmp_path / "dump"))
    assert first.name in faults and f"{second}: missing" in faults
