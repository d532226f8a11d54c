"""Positions of a dump that all models are asked about, and what each answers there."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.config.evaluated import EvaluatedModel
from pipeline.config.loading import load_recipe
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage1_teacher.dump.run import run_teacher
from stage2_student.evaluation.asked_positions import asked_records
from stage2_student.evaluation.bits_per_byte import run_eval
from stage2_student.evaluation.divergence import ByteModel, byte_divergence
from stage2_student.evaluation.scored_text import Reader
from tests.support.chats import chat, chat_model
from tests.support.scoring import named_corpus, normalising_model
from tests.support.tiny import END_OF_TEXT, tiny_model, tiny_tokenizer


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
    text = named_corpus(tmp_path / "text.jsonl", "the" * 160, "and é")
    small = EvaluatedModel("small", ModelSource(str(gpt2(tmp_path / "small", 64, tiny_tokenizer(["t h"])))))
    found = run_eval([small], {"text": text}, dumped / "dump", device="cpu")["small"]
    assert found["text"]["max_tokens"] == 64 and found["text"]["num_bytes"] == 480 + len("and é".encode())
    assert found["dump"]["records"] == 3 and found["dump"]["positions"] == 480 + 6 + 3 + 3
    assert math.isfinite(found["dump"]["jsd_nats"]) and found["dump"]["jsd_nats"] > 0
    with pytest.raises(ValueError, match=r"max_tokens is 65, but small has 64 positions"):
        run_eval([small], {"text": text}, max_tokens=65, device="cpu")


def test_in_one_window_or_several_the_divergence_is_that_of_the_rows_that_each_window_gives(dumped: Path) -> None:
    """A model that looks at nothing but the last token gives the same rows in any window."""
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
        EvaluatedModel("nfc", ModelSource(str(normalising_model(tmp_path / "nfc")))),
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
