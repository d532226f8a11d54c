"""Moving a model to another tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.tokenizer_bytes import ByteTokenizer
from stage2_student.transfer import longest_match, transfer
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_copied_where_bytes_agree_and_averaged_elsewhere(tmp_path: Path, tied: bool) -> None:
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
    counts = transfer(model, old, new, {new.default_start: old.default_start})
    after = model.get_input_embeddings().weight
    ids = {spelled: i for i, spelled in enumerate(new.token_bytes)}
    pieces = {spelled: i for i, spelled in enumerate(old.token_bytes)}
    torch.testing.assert_close(after[ids[b"th"]], before[pieces[b"th"]])
    torch.testing.assert_close(after[ids[b"on"]], before[[pieces[b"o"], pieces[b"n"]]].mean(0))
    torch.testing.assert_close(after[new.default_start], before[old.default_start])
    half = ids[b"\x82\x80"]  # not UTF-8: the old tokenizer cannot encode it
    torch.testing.assert_close(after[half], before[[pieces[b"\x82"], pieces[b"\x80"]]].mean(0))
    if not tied:
        torch.testing.assert_close(model.lm_head.weight[ids[b"on"]], head[[pieces[b"o"], pieces[b"n"]]].mean(0))
    assert (counts.copied, counts.averaged, counts.fallback, counts.control) == (258, 1, 1, 1)
    assert model.config.vocab_size == len(new.token_bytes) == 261
    assert (model.get_output_embeddings().weight is after) == tied


def test_longest_match_takes_the_longest_token_first() -> None:
    assert longest_match(b"abcz", {b"a": 0, b"ab": 1, b"c": 2, b"bc": 3}, 2) == [1, 2]
