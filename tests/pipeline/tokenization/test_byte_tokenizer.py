"""Every supported tokenizer, as a teacher's and a student's: it spells everything or is refused.

Everything is all bytes and hostile text. Loading one takes seconds, so that all that is asked of them is asked here.
"""

import base64
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.sources.resolve import resolve_file, resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from pipeline.tokenization.file_formats import GPT2_PATTERN, QWEN_PATTERN, read_ranks
from tests.support import families
from tests.support.families import load
from tests.support.unicode_texts import hostile

SOURCES = {name: family.source for name, family in families.SMALL.items() if family.normalizer is None}
SOURCES["smollm2"] = families.FAMILIES["smollm2"].source
MIXED = (
    "Ça va? naïve e\u0301 <0x0A> <|x|> Привет 日本語のテキスト 안녕 مرحبا 👩‍👩‍👧 🏳️‍🌈"
    "\r\n\n\t  x    y 12345 don't\u00a0\u200b\u3000\ufeff"
)
every = pytest.mark.parametrize("name", SOURCES)
small = pytest.mark.parametrize("name", families.SMALL)


def spelled(tokenizer: ByteTokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes[token] or b"<nothing>" for token in ids)


@every
def test_each_byte_has_a_token_of_its_own_except_where_smollm2_lacks_it(name):
    missing = set(range(256)) - {token[0] for token in load(name).token_bytes if token is not None and len(token) == 1}
    lacks = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")
    assert missing == (set(lacks) if name == "smollm2" else set())


@every
def test_mixed_scripts_and_whitespace_are_spelled_exactly(name):
    tokenizer = load(name)
    for text in (MIXED, " " + MIXED, "", " ", "\n", "a" * 5000):
        ids = tokenizer.encode(text.encode())
        assert spelled(tokenizer, ids) == tokenizer.prefix + text.encode()


@every
def test_text_that_spells_control_tokens_is_text(name):
    tokenizer = load(name)
    assert tokenizer.control
    for control in [*list(tokenizer.control)[:300], "<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>"]:
        text = f"{control} a {control}{control}"
        if "▁" in control and tokenizer.prefix:
            continue
        ids = tokenizer.encode(text.encode())
        assert not set(ids) & set(tokenizer.control.values())
        assert spelled(tokenizer, ids) == tokenizer.prefix + text.encode()


@every
def test_any_text_is_spelled_exactly_or_refused(name):
    tokenizer = load(name)

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text: str) -> None:
        [ids] = tokenizer.encode_batch([text.encode()])
        if isinstance(ids, SpellingError):
            assert ("▁" in text and tokenizer.prefix) or name == "smollm2"
        else:
            assert spelled(tokenizer, ids) == tokenizer.prefix + text.encode()

    check()


@small
def test_documents_of_many_scripts_are_spelled_by_teacher_and_student(name):
    counts = families.check(load(name), families.documents())
    assert sum(counts.values()) == 200
    assert counts["exact"] >= 120
    assert set(counts) <= {"exact", *families.FAMILIES[name].left_out}


@small
def test_hostile_unicode_is_spelled_or_left_out_with_a_reason_that_is_expected(name):
    tokenizer = load(name)
    counts = families.check(tokenizer, [hostile(seed, sorted(tokenizer.control)).encode() for seed in range(100)])
    assert set(counts) <= {"exact", *families.FAMILIES[name].left_out}
    if not families.FAMILIES[name].left_out:
        assert counts["exact"] == 100


@pytest.mark.parametrize(
    ("name", "remark"),
    [("gpt2-nfc", "normalises text (NFC): documents that change under it"), ("mistral-v1", "writes a space as U+2581")],
)
def test_a_tokenizer_that_leaves_documents_out_says_so_when_it_is_loaded(name, remark):
    [said] = load(name).remarks()
    assert said.startswith(remark)
    assert said.endswith("are counted and left out")


@pytest.mark.parametrize("name", ["bytes", "gpt2", "qwen", "deepseek", "tekken"])
def test_a_tokenizer_that_spells_everything_has_nothing_to_remark(name):
    assert load(name).remarks() == []


@pytest.mark.parametrize(("name", "pattern"), [("gpt2", GPT2_PATTERN), ("qwen", QWEN_PATTERN)])
def test_a_converted_rank_file_gives_the_ids_of_tiktoken(name, pattern):
    ranks = read_ranks(Path(resolve_file(SOURCES[name])))
    reference = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in (MIXED, "The quick brown fox, 1234567 times; it's    here.\n\n\nNew"):
        assert load(name).encode(text.encode()) == reference.encode_ordinary(text)


def test_a_converted_sentencepiece_model_gives_the_ids_of_sentencepiece():
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(resolve_file(SOURCES["mistral-v1"])))
    for text in (MIXED, "Hello   world", " leading", "for i in range(10):\n    print(i)"):
        assert load("mistral-v1").encode(text.encode()) == reference.encode(text)


def test_tekken_ids_are_ranks_after_a_thousand_control_tokens():
    values = json.loads(Path(resolve_file(SOURCES["tekken"])).read_text(encoding="utf-8"))
    tokenizer = load("tekken")
    entries = values["vocab"][: values["config"]["default_vocab_size"] - 1000]
    assert list(tokenizer.token_bytes[1000:]) == [base64.b64decode(entry["token_bytes"]) for entry in entries]


def test_documented_ids_of_control_tokens():
    assert load("gpt2").token_id("<|endoftext|>") == 50256
    assert load("qwen").token_id("<|im_end|>") == 151645
    assert load("smollm2").token_id("<|endoftext|>") == 0
    assert load("mistral-v1").default_start == 1
    assert load("mistral-v1").default_end == 2


@pytest.mark.parametrize(("template", "start"), [("<|x|> $A", 257), ("$A <|x|>", 256), ("$A", 256)])
def test_the_start_is_what_the_tokenizer_puts_first_or_else_its_bos(template, start):
    tokenizer = Tokenizer.from_file(str(Path(resolve_tokenizer("bytes"), "tokenizer.json")))
    tokenizer.add_special_tokens(["<|x|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|x|>", 257)])
    assert ByteTokenizer.from_definition(json.loads(tokenizer.to_str()), 256, None).default_start == start


def test_an_unknown_control_token_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"nearest it has: <\|endoftext\|>"):
        load("gpt2").token_id("<|endoftxt|>")


def test_digits_of_smollm2_stay_apart_as_its_gguf_forgets():
    assert len(load("smollm2").encode(b"1889")) == 4


def test_bytes_without_a_token_are_refused_with_their_offset():
    with pytest.raises(SpellingError, match=r"at byte 2 it has b'\\x04c'"):
        load("smollm2").encode(b"ab\x04c")


def test_a_document_that_is_not_utf8_is_refused_with_its_offset():
    good, bad = load("gpt2").encode_batch([b"ok", b"ab\xff"])
    assert isinstance(good, list)
    assert isinstance(bad, SpellingError)
    assert "at byte 2" in str(bad)


def test_loading_twice_gives_one_hash_and_other_tokenizers_other_hashes():
    assert len({load(name).sha256 for name in SOURCES}) == len(SOURCES)
    assert ByteTokenizer.load(resolve_tokenizer(SOURCES["gpt2"])).sha256 == load("gpt2").sha256


def byte_level(**changes: object) -> dict:
    return json.loads(Path(resolve_tokenizer("bytes"), "tokenizer.json").read_text(encoding="utf-8")) | changes


def test_a_document_that_a_normalizer_would_change_is_refused_and_the_normalizer_named():
    tokenizer = ByteTokenizer.from_definition(byte_level(normalizer={"type": "NFC"}), 256, 256)
    assert tokenizer.encode("é".encode()) == list("é".encode())
    with pytest.raises(SpellingError, match=r"normalizer \(NFC\)"):
        tokenizer.encode("e\u0301".encode())


def test_an_added_token_that_is_not_special_spells_its_text():
    added = {"id": 257, "content": "<think>", "special": False, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    definition = byte_level()
    definition["added_tokens"].append(added)
    tokenizer = ByteTokenizer.from_definition(definition, 256, 256)
    assert tokenizer.encode(b"a<think>b") == [97, 257, 98]
    assert tokenizer.token_bytes[257] == b"<think>"


def test_a_tokenizer_that_cannot_spell_bytes_is_refused_with_the_reason():
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    for tokenizer in (wordpiece, unigram):
        with pytest.raises(ValueError, match="cannot spell every byte"):
            ByteTokenizer.from_definition(json.loads(tokenizer.to_str()), None, None)
