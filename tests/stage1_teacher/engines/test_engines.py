"""Targets through real engines on a tiny random model, against brute force in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline.config import PlacementConfig, Recipe, TeacherConfig
from pipeline.corpus.documents import Document
from pipeline.covering.covering import Covering, ReducedRow
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import BranchToken, Engine, EngineRequest, ListingEngine, SparseEngine
from stage1_teacher.engines.registry import open_engine
from stage1_teacher.engines.self_check import compare_rows, probe_rows
from stage1_teacher.inputs.encoded_windows import cut_document
from stage1_teacher.reduction.sparse_targets import SpanRequest, Sparsity, reduce_span
from stage1_teacher.reduction.sparsify import Entries
from stage1_teacher.reduction.types import RowsAlong
from stage1_teacher.targets.opening import open_teacher
from tests.support import brute_force
from tests.support.tiny import tiny_tokenizer

DOCUMENTS = ["the thing and", " in the and é", "", "banding"]


def token_bytes() -> list[bytes | None]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = tiny_tokenizer()
    spelled = [bytes(byte_of[c] for c in tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer) - 1)]
    return [*spelled, None]


def brute_force_targets(model: Path, documents: list[str]) -> list[np.ndarray]:
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer, spelled = tiny_tokenizer(), token_bytes()
    end = tokenizer.eos_token_id

    def probs(path: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            return whole(torch.tensor([[end, *path]])).logits[0, -1].softmax(-1).numpy()

    return [
        brute_force.canonical_targets(probs, spelled, {end}, tokenizer.encode(text), text.encode())
        for text in documents
    ]


def engine_targets(engine: str, model: Path, dtype: str = "float32", **placement: int) -> list[np.ndarray]:
    config = TeacherConfig(model=str(model), engine=engine, dtype=dtype, max_tokens=64, overlap_tokens=8)
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    # The longest prompt is computed in parts of 8 tokens, and its logits in chunks of 3 rows.
    placed = PlacementConfig(engine_batch_tokens=8, reduce_rows=3, **placement)  # type: ignore[arg-type]
    opened = open_engine(EngineRequest(str(model), config, placed, ByteTokenizer.load(str(model)), end, (end,)))
    assert not isinstance(opened, ListingEngine)
    tokens = [tokenizer.encode(text) for text in DOCUMENTS]
    prompts = [[end, *ids] for ids in tokens]
    coverings = [Covering(opened.vocabulary, ids, text.encode()) for ids, text in zip(tokens, DOCUMENTS, strict=True)]
    requests = [RowsAlong.canonical(covering, 0, num_top=5) for covering in coverings]
    rows = [of_prompt for [of_prompt] in opened.reduced_rows(prompts, [[request] for request in requests])]
    own_RV = opened.own_logprobs(prompts[0], 2)  # the first rows of a chunk are not asked for
    for row, own_V in zip(rows[0][2:], own_RV, strict=True):
        values, ids = own_V.topk(5)
        assert row.top_ids_K.tolist() == ids.tolist()
        np.testing.assert_allclose(row.top_logprobs_K, values, rtol=0, atol=1e-4)
    last = RowsAlong(2, requests[0].document, requests[0].offsets_R[2:], requests[0].columns_R[2:])
    assert compare_rows(own_RV, rows[0][2:], last, opened.vocabulary).worst < 1e-4
    if isinstance(opened, SparseEngine):
        check_sparse(opened, prompts, coverings, rows)
    check_branches(opened, [prompts[0] * 4, prompts[1]], ByteTokenizer.load(str(model)))
    opened.close()
    return [covering.targets(of_prompt).probs_PV for covering, of_prompt in zip(coverings, rows, strict=True)]


def check_sparse(
    engine: SparseEngine, prompts: list[list[int]], coverings: list[Covering], rows: list[list[ReducedRow]]
) -> None:
    """Hold the targets that the engine sums itself against those that are summed here from its rows."""
    for sparsity in (
        Sparsity(16, 0.01, False, 2, 5, 0.01),
        Sparsity(256, 0.0, arithmetic=2),
        Sparsity(3, 0.2, True, 2),
    ):
        spans = [
            SpanRequest(0, prompt[1:], c.document, ((0, 2), (3, len(c.document) + 1)))
            for prompt, c in zip(prompts, coverings, strict=True)
        ]
        found = engine.sparse_targets(prompts, [[span] for span in spans], sparsity)
        for [of_span], span, covering, of_prompt in zip(found, spans, coverings, rows, strict=True):
            expected = reduce_span(covering, of_prompt, span, sparsity)
            np.testing.assert_array_equal(of_span.entries.counts_P, expected.entries.counts_P)
            np.testing.assert_allclose(dense(of_span.entries), dense(expected.entries), rtol=0, atol=1e-6)
            np.testing.assert_allclose(of_span.measures_MP, expected.measures_MP, rtol=0, atol=1e-6)
            np.testing.assert_allclose(of_span.token_logprobs, expected.token_logprobs, rtol=0, atol=1e-5)
            assert (of_span.tokens is None) is (expected.tokens is None) is not bool(sparsity.num_top)
            for found_T, expected_T in zip(of_span.tokens or (), expected.tokens or (), strict=True):
                np.testing.assert_allclose(found_T, expected_T, rtol=0, atol=1e-5)


def check_branches(engine: Engine, prompts: list[list[int]], tokenizer: ByteTokenizer) -> None:
    """Hold branches of two prompts, opened not to branch, against what the model gives for their whole paths alone."""
    tokens = [BranchToken(0, 2, 7, None), BranchToken(1, len(prompts[1]), 9, None), BranchToken(0, 3, 5, None)]
    deeper = [BranchToken(1, len(prompts[1]), 8, 1), BranchToken(0, 2, 3, 0)]
    paths = [[*prompts[0][:2], 7], [*prompts[1], 9], [*prompts[0][:3], 5], [*prompts[1], 9, 8], [*prompts[0][:2], 7, 3]]
    of_paths = [probe_rows(path, tokenizer, engine.vocabulary, len(path) - 1) for path in paths]
    of_prompts = [probe_rows(prompt, tokenizer, engine.vocabulary, len(prompt) - 2) for prompt in prompts]
    branches = engine.branches(prompts, [[request] for request in of_prompts])
    rows = branches.extend(tokens, of_paths[:3]) + branches.extend(deeper, of_paths[3:])
    for prompt, [of_prompt], request in zip(prompts, branches.rows, of_prompts, strict=True):
        assert len(of_prompt) == 2
        own_RV = engine.own_logprobs(prompt, len(prompt) - 2)
        assert compare_rows(own_RV, of_prompt, request, engine.vocabulary).worst < 1e-4
    for path, row, request in zip(paths, rows, of_paths, strict=True):
        assert compare_rows(engine.own_logprobs(path, len(path) - 1), [row], request, engine.vocabulary).worst < 1e-4


def dense(entries: Entries) -> np.ndarray:
    probs_PV = np.zeros((len(entries.counts_P), 256))
    probs_PV[np.arange(len(entries.counts_P)).repeat(entries.counts_P), entries.symbols_E] = entries.probs_E
    return probs_PV


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_targets_through_an_engine_equal_brute_force(engine: str, model: Path) -> None:
    for found, expected in zip(engine_targets(engine, model), brute_force_targets(model, DOCUMENTS), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_targets_through_a_tensor_parallel_engine_equal_brute_force(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")  # so that what the engine sets does not outlast this test
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    found = engine_targets("vllm", model, tensor_parallel=2)
    for targets, expected in zip(found, brute_force_targets(model, DOCUMENTS), strict=True):
        np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU build takes pipelines")
def test_a_pipeline_is_refused_by_the_cpu_build(model: Path) -> None:
    with pytest.raises(ValueError, match=r"placement.pipeline_parallel is 2.*tensor_parallel"):
        engine_targets("vllm", model, pipeline_parallel=2)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_branch_rows_through_an_engine_give_the_exact_distribution(engine: str, model: Path, tmp_path: Path) -> None:
    documents = ["the thing", " and é", "", "banding"]
    recipe = Recipe.model_validate(
        {
            "corpus": {"source": "unused.jsonl"},
            "teacher": {
                "model": str(model),
                "engine": engine,
                "dtype": "float32",
                "max_tokens": 64,
                "overlap_tokens": 8,
            },
            "dump": {
                "path": str(tmp_path),
                # Nothing is dropped, so there is nothing to spread.
                "covering": {
                    "beam_width": 1000,
                    "branch_threshold": 0,
                    "rejoin_after_tokens": None,
                    "redistribute_dropped": True,
                },
            },
        }
    )
    tokenizer = ByteTokenizer.load(str(model))
    teacher = open_teacher(recipe, str(model), tokenizer)
    windows = [
        window for text in documents for window in cut_document(Document(text, text.encode(), None), tokenizer, 64, 8)
    ]
    output = teacher.run_engine(windows)
    found = teacher.targets(windows, output)
    teacher.engine.close()
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    end = tiny_tokenizer().eos_token_id

    def probs(path: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            return whole(torch.tensor([[end, *path]])).logits[0, -1].softmax(-1).numpy()

    for text, targets in zip(documents, found, strict=True):
        expected = brute_force.all_targets(probs, token_bytes(), {end}, text.encode())
        np.testing.assert_allclose(targets.probs_PV, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(targets.dropped_P, 0, atol=1e-4)
    assert output.num_tokens > sum(len(window.tokens) + 1 for window in windows)


def test_vllm_is_followed_where_it_norms_its_states_beside_the_head(tmp_path: Path) -> None:
    """MiMo's `compute_logits` does. Its weights are Qwen2's, and so are the logits that it should have."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = brute_force_targets(tmp_path, DOCUMENTS)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(stored | {"architectures": ["MiMoForCausalLM"]}), encoding="utf-8")
    for found, exact in zip(engine_targets("vllm", tmp_path), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)
