"""`bld eval`: the model's own answer, on the same bytes for each model, whatever their lengths."""

import gc
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.config import CorpusConfig
from pipeline.config.evaluated import EvaluatedModel
from pipeline.config.loading import load_recipe
from pipeline.runtime.causality import check_causal
from pipeline.runtime.huggingface import load_model
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage1_teacher.dump.run import run_teacher
from stage2_student.evaluation import bits_per_byte
from stage2_student.evaluation.bits_per_byte import run_eval
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Spelled, common_spans
from tests.support.chats import CHAT_FAMILIES, chat, chat_model, load_chat
from tests.support.scoring import score
from tests.support.tiny import END_OF_TEXT, MERGES, save_tiny, tiny_model, tiny_tokenizer

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


def normalising(folder: Path) -> Path:
    """Make a model whose tokenizer cannot spell a decomposed accent."""
    wrapped = tiny_tokenizer()
    wrapped.backend_tokenizer.normalizer = normalizers.NFC()
    return save_tiny(folder, wrapped, seed=5)


def corpus(path: Path, *texts: str) -> CorpusConfig:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return CorpusConfig(source=str(path), id_field="id")


def test_models_with_other_tokenizers_are_scored_on_the_same_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model needs 600 tokens for a document, another 200; a third cannot spell one."""
    text = corpus(tmp_path / "text.jsonl", "the thing", "the" * 200, "e\u0301 and", "and é", "in " * 300)
    bytes_alone, merged = tiny_model(tmp_path / "bytes", merges=["t h"]), tiny_model(tmp_path / "merged")
    folders = {"start": bytes_alone, "student": merged, "teacher": normalising(tmp_path / "nfc")}
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
        {"text": corpus(tmp_path / "text.jsonl", "the thing")},
        device="cpu",
    )
    assert len(loaded) == 2


def test_of_chats_the_same_bytes_are_scored_where_templates_take_some_of_an_answer() -> None:
    """Mistral's first word shares a token with its template; an "a" behind a line break shares one with others."""
    merges = [*MERGES, "Ċ Ċ", "Ċ a", "Ġ a", "Ġa n"]
    readers = [Reader(name, (c := load_chat(name, merges)).tokenizer, c, 0) for name in CHAT_FAMILIES]
    chats = [chat("in?", "and the end"), chat("the?", "an\nand"), chat("the thing?", "and yes", "in?", "a thing")]
    text = scored_text(chats, readers)
    counts = [
        sum(end - start for spelled in r.spell(chats) if isinstance(spelled, Spelled) for start, end in spelled.spans)
        for r in readers
    ]
    assert len(set(counts)) > 1 and 0 < text.num_bytes <= min(counts)
    for reader in readers:
        scored = 0
        for number, spelled in enumerate(reader.spell(chats)):
            assert isinstance(spelled, Spelled)
            sizes = spelled.token_bytes(text.spans(number, spelled))
            scored += int(sizes[sizes > 0].sum())
        assert scored == text.num_bytes


def test_common_spans_end_where_all_models_have_a_token_end() -> None:
    def spelled(*edges: list[int]) -> Spelled:
        from stage2_student.evaluation.spelled_text import TextTokens

        return Spelled([0], tuple(TextTokens(1, own) for own in edges))

    assert common_spans([spelled([0, 3, 9]), spelled([0, 2, 9])]) == ((0, 9),)
    assert common_spans([spelled([0, 3, 9]), spelled([2, 3, 5, 9])]) == ((3, 9),)
    assert common_spans([spelled([0, 3, 9], [20, 25]), spelled([2, 5, 8], [20, 22, 25])]) == ((20, 25),)
    assert common_spans([spelled([0, 9]), spelled([1, 8])]) == ()
    assert common_spans([spelled([4, 4, 9]), spelled([4, 6, 9])]) == ((4, 9),)


@pytest.mark.parametrize("name", ["qwen", "llama3", "gemma", "mistral"])
def test_a_long_chat_is_scored_whole_in_windows_that_begin_like_chats(name: str) -> None:
    loaded = load_chat(name)
    reader = Reader(name, loaded.tokenizer, loaded, 0)
    messages = chat(*(part for i in range(6) for part in ("the thing " * 4 + str(i), "and in the end " * (2 + i))))
    if CHAT_FAMILIES[name].strips:
        messages = [message | {"content": message["content"].strip()} for message in messages]
    [spelled] = reader.spell([messages])
    assert isinstance(spelled, Spelled) and len(spelled.tokens) > 128
    begins = []
    for window in bits_per_byte.cut_tokens(
        spelled.token_bytes(spelled.spans) >= 0, 128, spelled.restarts, spelled.repeats_start
    ):
        begins.append(window.begin)
        read = window.read(spelled.tokens)
        assert read[0] == spelled.tokens[0] and read[1] != read[0] and len(read) <= 128
    assert len(begins) > 1 and set(begins[1:]) <= set(spelled.restarts)
    windows = list(bits_per_byte.cut_document(spelled, spelled.spans, 128))
    assert sum(window.num_bytes for window in windows) == sum(end - start for start, end in spelled.spans)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a dump of texts of up to 480 bytes, and its teacher, which needs few tokens for them."""
    work = tmp_path_factory.mktemp("dumped")
    tiny_model(work / "teacher")
    (work / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("the" * 160, "and é", "e\u0301"))
    )
    (work / "recipe.yaml").write_text(
        f"corpus: {{source: {work / 'corpus.jsonl'}}}\n"
        f"teacher: {{model: {work / 'teacher'}, engine: transformers, dtype: float32, "
        f"start: {END_OF_TEXT}, end: ['{END_OF_TEXT}'], "
        "max_tokens: 512}\n"
        f"dump: {{path: {work / 'dump'}, top_k: 256, min_prob: 0.0}}\n"
    )
    run_teacher(load_recipe(work / "recipe.yaml"))
    return work


def gpt2(folder: Path, positions: int, wrapped: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(wrapped), n_embd=32, n_layer=2, n_head=2, n_positions=positions
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def test_a_model_of_few_positions_is_read_in_windows_on_text_and_beside_a_dump(dumped: Path, tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.jsonl", "the" * 160, "and é")
    small = EvaluatedModel("small", ModelSource(str(gpt2(tmp_path / "small", 64, tiny_tokenizer(["t h"])))))
    found = run_eval([small], {"text": text}, dumped / "dump", device="cpu")["small"]
    assert found["text"]["max_tokens"] == 64 and found["text"]["num_bytes"] == 480 + len("and é".encode())
    assert found["dump"]["records"] == 3 and found["dump"]["positions"] == 480 + 6 + 3 + 3
    assert math.isfinite(found["dump"]["jsd_nats"]) and found["dump"]["jsd_nats"] > 0
    with pytest.raises(ValueError, match=r"max_tokens is 65, but small has 64 positions"):
        run_eval([small], {"text": text}, max_tokens=65, device="cpu")


def test_in_one_window_or_several_the_divergence_is_that_of_the_rows_that_each_window_gives(dumped: Path) -> None:
    """A model that looks at nothing but the last token gives the same rows in any window."""
    from stage2_student.evaluation.asked_positions import asked_records
    from stage2_student.evaluation.divergence import ByteModel, byte_divergence

    model = AutoModelForCausalLM.from_pretrained(dumped / "teacher").eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    tokenizer = ByteTokenizer.load(str(dumped / "teacher"))
    end = tokenizer.token_id(END_OF_TEXT)
    asked = asked_records(dumped / "dump", [(Reader("m", tokenizer, None, end), (end,))])
    whole, cut = (
        byte_divergence(ByteModel(model, tokenizer, SpecialIds(end, (end,)), None, most), dumped / "dump", asked)
        for most in (512, 16)
    )
    assert cut["jsd_nats"] == pytest.approx(whole["jsd_nats"], rel=1e-5)
    assert cut["kl_clear_nats"] == pytest.approx(whole["kl_clear_nats"], rel=1e-5)
    assert {k: v for k, v in cut.items() if "nats" not in k} == {k: v for k, v in whole.items() if "nats" not in k}


def test_where_no_position_is_clear_there_is_no_figure_and_that_is_said(dumped: Path, capfd) -> None:
    from stage2_student.evaluation.asked_positions import asked_records
    from stage2_student.evaluation.divergence import ByteModel, byte_divergence

    tokenizer = ByteTokenizer.load(str(dumped / "teacher"))
    end = tokenizer.token_id(END_OF_TEXT)
    asked = asked_records(dumped / "dump", [(Reader("m", tokenizer, None, end), (end,))])
    model = ByteModel(
        AutoModelForCausalLM.from_pretrained(dumped / "teacher").eval(), tokenizer, SpecialIds(end, (end,)), None, 512
    )
    found = byte_divergence(model, dumped / "dump", asked, max_token_end=-1.0)
    assert found["kl_clear_nats"] is None and found["clear_share"] == 0 and found["jsd_nats"] >= 0
    assert "so kl_clear_nats is null" in capfd.readouterr().err


def test_a_record_that_one_model_cannot_spell_is_left_out_for_all(dumped: Path, tmp_path: Path) -> None:
    jobs = [
        EvaluatedModel("own", ModelSource(str(dumped / "teacher"))),
        EvaluatedModel("nfc", ModelSource(str(normalising(tmp_path / "nfc")))),
    ]
    found = run_eval(jobs, {}, dumped / "dump", device="cpu")
    for figures in found.values():
        assert figures["dump"]["records"] == 2 and figures["dump"]["positions"] == 480 + 6 + 2
        assert figures["dump"]["left_out"] == {"nfc: the tokenizer cannot spell it": 1}
    assert found["own"]["dump"]["text_sha256"] == found["nfc"]["dump"]["text_sha256"]
    assert found["own"]["dump"]["jsd_nats"] < 2e-3 < found["nfc"]["dump"]["jsd_nats"]


def test_models_of_chats_are_asked_about_the_same_positions(tmp_path: Path) -> None:
    names = ("qwen", "mistral")
    folders = [chat_model(tmp_path / name, name) for name in names]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat("the?", "and yes", "in?", "a thing")}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"corpus: {{source: {tmp_path / 'chats.jsonl'}, field: messages}}\n"
        f"teacher: {{model: {folders[0]}, engine: transformers, dtype: float32, max_tokens: 512}}\n"
        f"dump: {{path: {tmp_path / 'dump'}, top_k: 256, min_prob: 0.0}}\n"
    )
    run_teacher(load_recipe(tmp_path / "recipe.yaml"))
    jobs = [EvaluatedModel(name, ModelSource(str(folder))) for name, folder in zip(names, folders, strict=True)]
    alone = run_eval(jobs[:1], {}, tmp_path / "dump", device="cpu")["qwen"]["dump"]["positions"]
    both = run_eval(jobs, {}, tmp_path / "dump", device="cpu")
    assert both["qwen"]["dump"]["positions"] == both["mistral"]["dump"]["positions"] < alone
