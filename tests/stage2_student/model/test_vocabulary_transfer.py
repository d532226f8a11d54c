"""Moving a model to another tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.initial_student import export_start, tokenizer_moved
from stage2_student.model.row_sources import longest_match, row_sources
from tests.support.families import load, load_sentencepiece, train_sentencepiece
from tests.support.moved_models import move
from tests.support.small_dumps import make_recipe
from tests.support.tiny import MERGES, tiny_model, tiny_tokenizer


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
    counts = move(model, old, new, {new.default_start: old.default_start}, averaged_row_scale=0.5)
    after = model.get_input_embeddings().weight
    ids = {spelled: i for i, spelled in enumerate(new.token_bytes)}
    pieces = {spelled: i for i, spelled in enumerate(old.token_bytes)}
    torch.testing.assert_close(after[ids[b"th"]], before[pieces[b"th"]])
    torch.testing.assert_close(after[ids[b"on"]], before[[pieces[b"o"], pieces[b"n"]]].mean(0) / 2)
    torch.testing.assert_close(after[new.default_start], before[old.default_start])
    torch.testing.assert_close(after[ids[b"\xff"]], before.mean(0))  # in no text
    half = ids[b"\x82\x80"]  # not UTF-8: the old tokenizer cannot encode it
    torch.testing.assert_close(after[half], before[[pieces[b"\x82"], pieces[b"\x80"]]].mean(0) / 2)
    if not tied:
        torch.testing.assert_close(model.lm_head.weight[ids[b"on"]], head[[pieces[b"o"], pieces[b"n"]]].mean(0) / 2)
    assert counts.as_dict() == {"copied": 245, "averaged": 1, "fallback": 1, "control": 1, "unreachable": 13}
    assert model.config.vocab_size == len(new.token_bytes) == 261
    assert (model.get_output_embeddings().weight is after) == tied


def test_longest_match_takes_the_longest_token_first() -> None:
    assert longest_match(b"abcz", {b"a": 0, b"ab": 1, b"c": 2, b"bc": 3}, 2) == [1, 2]


NEW_MERGES = ["a n", "an d", "o n", "Ġ t", "t h", "th e"]


def models(folder: Path) -> dict[str, Any]:
    """Make models with a tied head, with an own one, and with an own one with a bias.

    All have the tokenizer of `MERGES`.
    """
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
        move(model, old, new, {new.default_start: old.default_start})
        after_LV = model(torch.tensor([[new.default_start, *(new_ids[t] for t in text)]])).logits[0]
    both = sorted((old_ids.keys() & new_ids.keys()) - {bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))})
    assert len(both) == 256 - 13 + 4
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
    move(model, old, new, {})
    model.save_pretrained(tmp_path / "moved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moved").eval()
    assert loaded.config.vocab_size == loaded.get_output_embeddings().weight.shape[0] == len(new.token_bytes)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (head == "tied")
    tokens_BL = torch.tensor([[len(new.token_bytes) - 1, 3, 259]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BL).logits, model(tokens_BL).logits)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ByteTokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return load_sentencepiece(train_sentencepiece(folder / "t.model", model_type=request.param))


@pytest.mark.parametrize("head", ["tied", "untied", "bias"])
def test_tokens_that_the_new_tokenizer_never_yields_take_no_share_of_the_mass(
    head: str, sentencepiece: ByteTokenizer, tmp_path: Path
) -> None:
    model = models(tmp_path)[head].eval()
    with torch.no_grad():  # as sure of itself as a trained model is
        model.get_output_embeddings().weight.mul_(6)
    old, new = ByteTokenizer.load(str(tmp_path / "old")), sentencepiece
    text = b"and the other thing: a line of 12 words, (more) or less."
    with torch.no_grad():
        before_LV = model(torch.tensor([old.encode(text)])).logits[0].double()
        counts = move(model, old, new, {})
        after_LV = model(torch.tensor([new.encode(text)])).logits[0].double()
    pieces = {
        spelled: token for token, spelled in enumerate(new.token_bytes) if spelled
    }  # the last of equals: no byte token
    yielded = {token for token in range(len(new.token_bytes)) if pieces.get(new.token_bytes[token] or b"") == token}
    twins = [token for token, spelled in enumerate(new.token_bytes) if spelled and token not in yielded]
    assert len(twins) > 80 and counts.unreachable == len(twins) + 13
    share = after_LV.softmax(-1)[:, twins].sum(-1).mean()
    assert share < 1e-3
    rows = [model.get_output_embeddings().weight[token] for token in twins]
    assert all(torch.equal(row, rows[0]) for row in rows) and before_LV.isfinite().all()


@pytest.mark.parametrize(("old_name", "new_name"), [("mistral-v1", "bytes"), ("gpt2", "mistral-v1")])
def test_a_copied_row_is_of_the_token_that_the_old_tokenizer_itself_yields(old_name: str, new_name: str) -> None:
    old, new = load(old_name), load(new_name)
    check_sources(old, new, min_copied=100)


def test_a_copied_row_is_of_the_token_that_a_sentencepiece_tokenizer_itself_yields(
    sentencepiece: ByteTokenizer,
) -> None:
    other = ByteTokenizer.from_wrapped(tiny_tokenizer(MERGES), "tiny")
    check_sources(sentencepiece, other, min_copied=80)
    check_sources(sentencepiece, sentencepiece, min_copied=1000)
    check_sources(other, sentencepiece, min_copied=80)


def check_sources(old: ByteTokenizer, new: ByteTokenizer, min_copied: int) -> None:
    """Each row of a token that is text, against the encoding of its bytes; no two of them of equal bytes."""
    sources, kinds = row_sources(old, new, {}, len(old.token_bytes))
    copied, seen = 0, set()
    for token, spelled in enumerate(new.token_bytes):
        if not spelled or kinds[token] == "unreachable" or not is_text(spelled):
            continue
        assert new.encode_batch([spelled], [b""]) == [[token]] and spelled not in seen
        seen.add(spelled)
        assert sources[token] == old.encode_batch([spelled], [b""])[0]
        assert kinds[token] == ("copied" if len(sources[token]) == 1 else "averaged")
        copied += kinds[token] == "copied"
    assert copied >= min_copied


def is_text(spelled: bytes) -> bool:
    return spelled.decode("utf-8", errors="replace").encode() == spelled


def test_pieces_of_what_the_old_tokenizer_cannot_encode_are_tokens_that_it_yields(sentencepiece: ByteTokenizer) -> None:
    new = ByteTokenizer.from_wrapped(tiny_tokenizer(["a Ã"]), "tiny")  # a letter and half a character
    sources, kinds = row_sources(sentencepiece, new, {}, len(sentencepiece.token_bytes))
    token = new.token_bytes.index(b"a\xc3")
    assert kinds[token] == "fallback"
    assert sources[token][:1] == sentencepiece.encode_batch([b"a"], [b""])[0]
    assert sentencepiece.token_bytes[sources[token][1]] == b"\xc3"


def test_a_run_that_an_earlier_release_began_keeps_its_start(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, model, tmp_path, {}, tokenizer="bytes")
    start = tmp_path / "start"
    start.mkdir()
    (start / "transfer.json").write_text(
        '{"copied": 1, "averaged": 0, "fallback": 0, "control": 0}'
    )  # no kind of today's
    assert export_start(recipe) == start
    assert [path.name for path in start.iterdir()] == ["transfer.json"] and tokenizer_moved(start)
