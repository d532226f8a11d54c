"""Moving a model to another tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from pipeline.tokenizer_bytes import ByteTokenizer
from stage2_student.transfer import longest_match, transfer
from tests.tiny import MERGES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_copied_where_bytes_agree_and_averaged_and_scaled_elsewhere(tmp_path: Path, tied: bool) -> None:
    old_folder, new_folder = (
        tiny_model(tmp_path / "old"),
        tiny_model(tmp_path / "new", merges=["t h", "o n", "Ã ©", "Ĥ Ģ"]),
    )
    model = AutoModelForCausalLM.from_pretrained(old_folder, tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2 + 1)
    before, head = model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()
    old, new = ByteTokenizer.load(str(old_folder)), ByteTokenizer.load(str(new_folder))
    assert old.default_start is not None and new.default_start is not None
    counts = transfer(model, old, new, {new.default_start: old.default_start}, averaged_scale=0.5)
    after = model.get_input_embeddings().weight
    ids = {spelled: i for i, spelled in enumerate(new.token_bytes)}
    pieces = {spelled: i for i, spelled in enumerate(old.token_bytes)}
    torch.testing.assert_close(after[ids[b"th"]], before[pieces[b"th"]])
    torch.testing.assert_close(after[ids[b"on"]], before[[pieces[b"o"], pieces[b"n"]]].mean(0) / 2)
    torch.testing.assert_close(after[new.default_start], before[old.default_start])
    half = ids[b"\x82\x80"]  # not UTF-8: the old tokenizer cannot encode it
    torch.testing.assert_close(after[half], before[[pieces[b"\x82"], pieces[b"\x80"]]].mean(0) / 2)
    if not tied:
        torch.testing.assert_close(model.lm_head.weight[ids[b"on"]], head[[pieces[b"o"], pieces[b"n"]]].mean(0) / 2)
    assert (counts.copied, counts.averaged, counts.fallback, counts.control) == (258, 1, 1, 1)
    assert model.config.vocab_size == len(new.token_bytes) == 261
    assert (model.get_output_embeddings().weight is after) == tied


def test_longest_match_takes_the_longest_token_first() -> None:
    assert longest_match(b"abcz", {b"a": 0, b"ab": 1, b"c": 2, b"bc": 3}, 2) == [1, 2]


NEW_MERGES = ["a n", "an d", "o n", "Ġ t", "t h", "th e"]


def models(folder: Path) -> dict[str, Any]:
    """A tied head, one of its own, and one of its own with a bias; all with the tokenizer of `MERGES`."""
    tiny_model(folder / "old")
    untied = AutoModelForCausalLM.from_pretrained(folder / "old", tie_word_embeddings=False)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().flip(0) * 2)
    tokenizer = tiny_tokenizer(MERGES)
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with_bias = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), initializer_range=0.3, **values))
    torch.nn.init.normal_(with_bias.lm_head.bias)
    return {"tied": AutoModelForCausalLM.from_pretrained(folder / "old"), "untied": untied, "bias": with_bias}


@pytest.mark.parametrize("head", ["tied", "untied", "bias"])
def test_a_moved_model_gives_copied_tokens_the_logits_they_had_and_averaged_ones_the_mean(
    head: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = models(tmp_path)[head].eval()
    old = ByteTokenizer.load(str(tmp_path / "old"))
    new = ByteTokenizer.load(str(tiny_model(tmp_path / "new", merges=NEW_MERGES)))
    assert old.default_start is not None and new.default_start is not None
    old_ids = {spelled: i for i, spelled in enumerate(old.token_bytes) if spelled}
    new_ids = {spelled: i for i, spelled in enumerate(new.token_bytes) if spelled}
    text = [b"the", b"and", b"x", b"\xc3", b"\xa9"]  # tokens of both
    with torch.no_grad():
        before_LV = model(torch.tensor([[old.default_start, *(old_ids[t] for t in text)]])).logits[0]
        transfer(model, old, new, {new.default_start: old.default_start})
        after_LV = model(torch.tensor([[new.default_start, *(new_ids[t] for t in text)]])).logits[0]
    both = sorted(old_ids.keys() & new_ids.keys())
    assert len(both) == 256 + 4
    ours_LV, theirs_LV = after_LV[:, [new_ids[t] for t in both]], before_LV[:, [old_ids[t] for t in both]]
    torch.testing.assert_close(ours_LV, theirs_LV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after_LV[:, new.default_start], before_LV[:, old.default_start], rtol=1e-4, atol=1e-4)
    pieces_LV = before_LV[:, [old_ids[b"o"], old_ids[b"n"]]]
    torch.testing.assert_close(after_LV[:, new_ids[b"on"]], pieces_LV.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["tied", "untied", "bias"])
def test_a_moved_model_is_the_same_when_it_is_saved_and_loaded(head: str, tmp_path: Path) -> None:
    model = models(tmp_path)[head].eval()
    old = ByteTokenizer.load(str(tmp_path / "old"))
    new = ByteTokenizer.load(str(tiny_model(tmp_path / "new", merges=NEW_MERGES)))
    transfer(model, old, new, {})
    model.save_pretrained(tmp_path / "moved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moved").eval()
    assert loaded.config.vocab_size == loaded.get_output_embeddings().weight.shape[0] == len(new.token_bytes)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (head == "tied")
    tokens_BL = torch.tensor([[len(new.token_bytes) - 1, 3, 259]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BL).logits, model(tokens_BL).logits)
