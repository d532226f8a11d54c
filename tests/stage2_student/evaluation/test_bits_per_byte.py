"""`bld eval`: the model's own answer, on the same bytes for each model, whatever their lengths."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.evaluated import EvaluatedModel
from pipeline.runtime.causality import check_causal
from pipeline.runtime.huggingface import load_model
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.evaluation import bits_per_byte
from stage2_student.evaluation.bits_per_byte import run_eval
from tests.support.scoring import named_corpus, normalising_model, score
from tests.support.tiny import tiny_model, tiny_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 1.5, "sliding_window": 16},
    "falcon_h1": {
        "lm_head_multiplier": 0.25, "embedding_multiplier": 2.0,
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_chunk_size": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "mamba": {"state_size": 8},
    "bert": {"is_decoder": True},
}  # fmt: skip
TEXTS = [b"the thing and the end", "in é, andé".encode(), b"a", b"the ing " * 12]


def tiny_family(name: str) -> tuple[Any, ByteTokenizer]:
    """Make a random model of a family, with logits that are far from even."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), pad_token_id=None, **(SIZES | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, ByteTokenizer.from_wrapped(tokenizer, name)


def own_nats(model: Any, tokens: Sequence[int], first: int = 1) -> float:
    """Return -ln p of the tokens from number `first` on.

    From the model's own output, one text at a time, in float64.
    """
    with torch.no_grad():
        logprobs_LV = model(input_ids=torch.tensor([list(tokens)])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs_LV[at - 1, tokens[at]]) for at in range(first, len(tokens)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_causal_model_of_any_family_is_known_as_one(name: str) -> None:
    check_causal(tiny_family(name)[0], name)


def test_a_model_that_looks_ahead_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "bert", {"is_decoder": False})
    with pytest.raises(ValueError, match="mine: BertLMHeadModel looks ahead"):
        check_causal(tiny_family("bert")[0], "mine")


@pytest.mark.parametrize("name", FAMILIES)
def test_bits_per_byte_are_those_of_the_models_own_logits(name: str) -> None:
    model, tokenizer = tiny_family(name)
    start = len(tokenizer.token_bytes) - 1
    found = score(model, tokenizer, TEXTS, start)
    nats = sum(own_nats(model, [start, *tokenizer.encode(text)]) for text in TEXTS)
    assert found["nats"] == pytest.approx(nats, rel=2e-5)
    assert found["num_bytes"] == sum(map(len, TEXTS)) and found["num_windows"] == len(TEXTS)


@pytest.mark.parametrize("name", ["llama", "granite", "falcon_h1"])
def test_a_long_document_is_scored_whole_each_token_once_in_its_window(name: str) -> None:
    model, tokenizer = tiny_family(name)
    start, most = len(tokenizer.token_bytes) - 1, 24
    text = ("the thing and é in the end, " * 5).encode()
    ids = [start, *tokenizer.encode(text)]
    found = score(model, tokenizer, [b"the", text], start, max_tokens=most)
    assert found["num_bytes"] == 3 + len(text) and found["num_tokens"] == len(ids) - 1 + 1
    # The slow version: a token of the first window sees all before it, a later one what its window reads.
    nats, done = own_nats(model, [start, *tokenizer.encode(b"the")]), 1
    while done < len(ids):
        begin = 0 if done == 1 else done - most // 4
        until = min(len(ids), begin + most + (begin == 0))
        window = ids[begin:until] if begin == 0 else [start, *ids[begin:until]]
        nats += own_nats(model, window, len(window) - (until - done))
        done = until
    assert found["nats"] == pytest.approx(nats, rel=2e-5)


def test_a_large_vocabulary_is_given_fewer_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_family("llama")
    whole = score(model, tokenizer, TEXTS, 268)
    sizes: list[int] = []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(input_ids.numel())
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(bits_per_byte, "_MAX_LOGITS", 20 * 269)
    parts = score(model, tokenizer, TEXTS, 268)
    assert parts["nats"] == pytest.approx(whole["nats"], rel=1e-6) and parts["num_tokens"] == whole["num_tokens"]
    assert len(sizes) > 1 and sum(size > 20 for size in sizes) == 1  # a text of more goes alone


def test_weights_that_are_not_finite_are_no_figure() -> None:
    model, tokenizer = tiny_family("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="model: the text has nan nats: either some weights are not finite"):
        score(model, tokenizer, TEXTS, 268)


def test_models_with_other_tokenizers_are_scored_on_the_same_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model needs 600 tokens for a document, another 200; a third cannot spell one."""
    text = named_corpus(tmp_path / "text.jsonl", "the thing", "the" * 200, "e\u0301 and", "and é", "in " * 300)
    bytes_alone, merged = tiny_model(tmp_path / "bytes", merges=["t h"]), tiny_model(tmp_path / "merged")
    folders = {"start": bytes_alone, "student": merged, "teacher": normalising_model(tmp_path / "nfc")}
    jobs = [EvaluatedModel(name, ModelSource(str(folder))) for name, folder in folders.items()]
    both = run_eval(jobs[:2], {"text": text}, max_tokens=256, device="cpu")
    assert both["start"]["text"]["num_windows"] > both["student"]["text"]["num_windows"]
    whole = sum(len(t.encode()) for t in ("the thing", "the" * 200, "e\u0301 and", "and é", "in " * 300))
    for found in both.values():
        assert found["text"]["num_bytes"] == whole and found["text"]["left_out"] == {}
    assert "documents read in" in capsys.readouterr().err
    three = run_eval(jobs, {"text": text}, max_tokens=256, device="cpu")
    same = [
        {key: three[name]["text"][key] for key in ("num_bytes", "num_documents", "left_out", "text_sha256")}
        for name in folders
    ]
    assert same[0] == same[1] == same[2] and same[0]["num_documents"] == 4
    assert same[0]["left_out"] == {"teacher: the tokenizer cannot spell it": 1}
    assert same[0]["text_sha256"] != both["start"]["text"]["text_sha256"]
    assert "left out for all models: 1, teacher: the tokenizer cannot spell it; the first is document d2" in " ".join(
        capsys.readouterr().err.split()
    )


def test_one_model_is_gone_before_the_next_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*arguments: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in loaded)
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("stage2_student.evaluation.bits_per_byte.load_model", load)
    folder = str(tiny_model(tmp_path / "model"))
    run_eval(
        [EvaluatedModel(name, ModelSource(folder)) for name in "ab"],
        {"text": named_corpus(tmp_path / "text.jsonl", "the thing")},
        device="cpu",
    )
    assert len(loaded) == 2
