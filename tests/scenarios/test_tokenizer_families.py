"""Small tokenizers of every kind, trained here: they spell a document's bytes, or say why not."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.file_formats import from_sentencepiece
from tests.support import families
from tests.support.families import SPACE_MARK, check
from tests.support.unicode_texts import hostile


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def unigram(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("unigram") / "unigram.model"
    return families.train_sentencepiece(path, add_dummy_prefix=request.param)


def test_unigram_with_byte_fallback_spells_what_has_no_mark_for_a_space(unigram):
    tokenizer = families.load_sentencepiece(unigram)
    controls = sorted(tokenizer.control)
    made = [hostile(seed, controls).encode() for seed in range(100)]
    counts = check(tokenizer, families.documents() + made)
    assert set(counts) <= {"exact", SPACE_MARK}
    assert counts[SPACE_MARK] == sum("▁".encode() in document for document in families.documents() + made)


def test_unigram_gives_the_ids_of_sentencepiece_or_ids_of_the_same_score(unigram):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    tokenizer = families.load_sentencepiece(unigram)
    for document in families.documents()[:20] + families.documents()[-40:]:
        ids, theirs = tokenizer.encode(document), reference.encode(document.decode())
        if ids != theirs:  # a line of an odd number of dashes: which of them stands alone is a tie
            assert sorted(ids) == sorted(theirs)


def test_text_that_names_a_byte_token_of_unigram_is_text(unigram):
    tokenizer = families.load_sentencepiece(unigram)
    text = b"<0x0A> x<0xE2><0x96><0x81>"
    assert b"".join(tokenizer.token_bytes[token] or b"" for token in tokenizer.encode(text)) == tokenizer.prefix + text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"byte_fallback": False, "vocab_size": 2000, "hard_vocab_limit": False},
            "byte_fallback False",
        ),  # as T5, XLM-R
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces True"),
        ({"model_type": "char", "byte_fallback": False}, "word or character"),
    ],
)
def test_a_sentencepiece_model_that_loses_text_is_refused_with_the_reason(tmp_path, options, reason):
    path = families.train_sentencepiece(tmp_path / "x.model", **options)
    with pytest.raises(ValueError, match=f"{reason}.*choose another"):
        from_sentencepiece(path)


def wordpiece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))


def t5_like() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], 0, False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return tokenizer


def whole_words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def first_gpt() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))


def dropping_spaces() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (wordpiece, "WordPiece tokenizer that drops the spaces"),
        (t5_like, "neither byte-level nor has byte fallback"),
        (whole_words, "WordLevel tokenizer that knows whole words only"),
        (first_gpt, r"marks where words begin or end \(end_of_word_suffix\)"),
        (dropping_spaces, r"drops text where it splits \(WhitespaceSplit\)"),
    ],
)
def test_another_family_is_refused_with_the_reason_and_what_is_supported(made, reason):
    with pytest.raises(ValueError, match=f"{reason}.*Supported are byte-level BPE.*SentencePiece BPE and Unigram"):
        ByteTokenizer.from_definition(json.loads(made().to_str()), None, None)


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [("NFC", "e\u0301"), ("NFD", "é"), ("NFKC", "ﬁ"), ("NFKD", "ﬁ"), ("Lowercase", "A"), ("StripAccents", "e\u0301")],
)
def test_a_normalizer_is_named_and_blamed_only_for_what_it_changes(normalizer, text):
    definition = families.definition(families.resolve_tokenizer("bytes")) | {"normalizer": {"type": normalizer}}
    tokenizer = ByteTokenizer.from_definition(definition, 256, 256)
    assert tokenizer.remarks() == [
        f"normalises text ({normalizer}): documents that change under it are counted and left out"
    ]
    changed, kept = tokenizer.encode_batch([text.encode(), "plain 日本".encode()])
    assert str(getattr(changed, "reason", "")) == f"its normalizer ({normalizer}) changes the text"
    assert kept == list("plain 日本".encode())
