"""Byte divergence: zero to oneself, equal to the dense sum, and larger to another model."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.evaluated import EvaluatedModel
from pipeline.config.loading import load_recipe
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.special_ids import SpecialIds
from schemas.manifest import Manifest
from schemas.record import Record, Segment
from schemas.shard import read_shard
from stage1_teacher.dump.run import run_teacher
from stage1_teacher.reduction.sparsify import sparsify
from stage2_student.evaluation.bits_per_byte import run_eval
from stage2_student.evaluation.divergence import ByteModel, sparse_divergence
from tests.support.tiny import END_OF_TEXT, save_tiny, tiny_model, tiny_tokenizer


def record_of(probs_PV: np.ndarray, document: bytes, top_k: int) -> Record:
    realised_P = np.frombuffer(document, dtype=np.uint8)
    entries = sparsify(probs_PV, realised_P, top_k, 0.0)
    logprobs = np.log(entries.probs_E).astype(np.float32)
    zeros = np.zeros(len(document), dtype=np.float32)
    lengths = np.array([len(document)], dtype=np.int32)
    segments = (Segment(0, len(document), False),)
    columns = (entries.counts_P, zeros, zeros, zeros, entries.symbols_E, logprobs)
    return Record("0", 0, document, segments, lengths, np.zeros(1, np.float32), *columns)


def random_probs(rng: np.random.Generator, num_positions: int) -> np.ndarray:
    exp = np.exp(rng.normal(size=(num_positions, 256)) * 2)
    return exp / exp.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("top_k", [256, 16, 1])
def test_sparse_kl_is_the_dense_sum_with_the_tail_as_one_class(top_k: int) -> None:
    rng = np.random.default_rng(0)
    teacher_PV, model_PV = random_probs(rng, 9), random_probs(rng, 9)
    record = record_of(teacher_PV, b"ninebytes", top_k)
    found, jsd = sparse_divergence(record, model_PV)
    start = 0
    for position, count in enumerate(record.entry_counts):
        stored = record.symbols[start : start + count]
        t, p = teacher_PV[position, stored], model_PV[position, stored]
        expected = (t * np.log(t / p)).sum()
        if count < 256:
            expected += (1 - t.sum()) * np.log((1 - t.sum()) / (1 - p.sum()))
        assert found[position] == pytest.approx(expected, abs=1e-5)
        start += count
    assert (jsd > 0).all() and (jsd < np.log(2)).all()
    assert all((divergence < 1e-5).all() for divergence in sparse_divergence(record, teacher_PV))


def test_a_teacher_with_several_ends_has_no_divergence_to_its_own_dump(tmp_path: Path) -> None:
    wrapped = tiny_tokenizer()
    wrapped.add_tokens(["<stop>"], special_tokens=True)
    own = save_tiny(tmp_path / "own", wrapped, seed=0)
    ends = (END_OF_TEXT, "<stop>")
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "the thing and é"}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"corpus: {{source: {tmp_path / 'corpus.jsonl'}}}\n"
        f"teacher: {{model: {own}, engine: transformers, dtype: float32, end: {list(ends)}, max_tokens: 512}}\n"
        f"dump: {{path: {tmp_path / 'dump'}, top_k: 256, min_prob: 0.0, audit_documents: 0}}\n"
    )
    run_teacher(load_recipe(tmp_path / "recipe.yaml"))
    found = run_eval(
        [
            EvaluatedModel("all", ModelSource(str(own)), None, ends),
            EvaluatedModel("one", ModelSource(str(own)), None, ends[0]),
        ],
        {},
        tmp_path / "dump",
    )
    assert found["all"]["dump"]["jsd_nats"] < 1e-6 and found["one"]["dump"]["jsd_nats"] > 1e-5  # all symbols are stored


def test_a_model_has_no_divergence_to_its_own_dump_and_some_to_anothers(tmp_path: Path) -> None:
    own, other = tiny_model(tmp_path / "own", seed=0), tiny_model(tmp_path / "other", seed=1)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the thing and é", "banding")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"corpus: {{source: {corpus}}}\n"
        f"teacher: {{model: {own}, engine: transformers, dtype: float32, "
        f"start: {END_OF_TEXT}, end: ['{END_OF_TEXT}'], max_tokens: 512}}\n"
        f"dump: {{path: {tmp_path / 'dump'}, top_k: 256, min_prob: 0.0}}\n"
    )
    run_teacher(load_recipe(recipe))
    end = tiny_tokenizer().eos_token_id
    jobs = [EvaluatedModel("own", ModelSource(str(own))), EvaluatedModel("other", ModelSource(str(other)))]
    found = run_eval(jobs, {}, tmp_path / "dump")
    same = found["own"]["dump"]
    assert same["positions"] == len("the thing and é".encode()) + len("banding") + 2
    # 256 nearly equal entries, unlike a real teacher's: one level there spans 0.4 of an entry.
    assert abs(same["kl_clear_nats"]) < 5e-3 and same["jsd_nats"] < 1e-3
    assert found["other"]["dump"]["jsd_nats"] > 0.01
    record = next(read_shard(Manifest.load(tmp_path / "dump").shards[0].path(tmp_path / "dump")))
    assert ByteModel.load(str(own), SpecialIds(end, (end,))).targets(record.document).probs_PV.shape == (
        len(record.document) + 1,
        256,
    )
