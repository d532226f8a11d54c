"""The corpus: every row is a document or is counted under a reason, and the n-th document is always the same."""

import pytest

from pipeline.config import CorpusConfig
from pipeline.config.loading import load_recipe
from pipeline.corpus.documents import Corpus
from tests.support.corpus_files import corpus, lines, texts


def test_each_kind_of_bad_row_is_counted_under_its_own_reason(tmp_path):
    path = tmp_path / "c.jsonl"
    good = '{"text": "é"}\n'.encode()
    bad = [
        b"{oops\n",
        b'{"other": 1}\n',
        b'{"text": 5}\n',
        b'{"text": ""}\n',
        b'{"text": "\\ud800"}\n',
        b'{"text": "\xff"}\n',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + good + b"".join(bad) + b"\n[1]\n" + b"[" * 100_000 + b"\n" + good.strip())
    found = corpus(path)
    assert texts(found) == ["é".encode()] * 2
    assert found.counts == {
        "documents": 2,
        "bytes": 4,
        "left out: malformed JSON": 2,
        "left out: no field 'text'": 1,
        "left out: field 'text' is not text": 1,
        "left out: empty text": 1,
        "left out: half of a surrogate pair": 1,
        "left out: not valid UTF-8": 1,
        "left out: blank line": 1,
        "left out: not a JSON object": 1,
    }


@pytest.mark.parametrize("value", [None, True, 1.5, "", {"a": 1}, "\ud800"])
def test_an_id_is_text_or_a_whole_number(tmp_path, value):
    path = lines(tmp_path / "c.jsonl", {"n": value, "text": "a"}, {"n": 7, "text": "b"}, {"n": "../é", "text": "c"})
    found = corpus(path, id_field="n")
    assert [document.doc_id for document in found.documents()] == ["7", "../é"]


def test_of_a_chat_the_text_is_what_the_assistant_says(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = lines(tmp_path / "c.jsonl", {"messages": chat}, {"messages": chat[:1]}, {"messages": [{"role": "user"}]})
    found = corpus(path, field="messages")
    [document] = found.documents()
    assert (document.text, document.messages) == (b"a", tuple(chat))
    assert sum(number for key, number in found.counts.items() if key.startswith("left out")) == 2


def test_a_document_that_shares_any_key_is_left_out(tmp_path):
    path = lines(tmp_path / "c.jsonl", *({"text": text} for text in ("T -- one", "U -- one", "V -- two", "T -- three")))
    held_out = lines(tmp_path / "e.jsonl", {"text": "two"})
    pattern = "(?s)(?:(?P<title>.*?) -- )?(?P<body>.*)"
    found = corpus(path, unique=True, key_pattern=pattern, exclude=(CorpusConfig(source=str(held_out)),))
    assert texts(found) == [b"T -- one"]
    assert found.counts["left out: a duplicate"] == 2
    assert found.counts["left out: in an excluded corpus"] == 1


def test_a_corpus_without_a_usable_document_is_refused_with_the_counts_and_the_first_place(tmp_path):
    path = lines(tmp_path / "c.jsonl", {"txt": "a"})
    with pytest.raises(ValueError, match=r"no field 'text'.*c\.jsonl, line 1"):
        texts(corpus(path))


def test_a_key_pattern_without_named_groups_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no group"):
        corpus(lines(tmp_path / "c.jsonl", {"text": "a"}), key_pattern="(.*)")


def test_the_demo_trains_on_no_passage_that_shares_title_or_body_with_its_evaluation():
    recipe = load_recipe("demo")
    training = Corpus(recipe.corpus.model_copy(update={"limit": None}))
    assert recipe.eval is not None
    evaluation = Corpus(recipe.eval.model_copy(update={"limit": None, "key_pattern": recipe.corpus.key_pattern}))
    held_out = {key for document in evaluation.documents() for key in training.keys(document.text)}
    documents = list(training.documents())
    assert len(documents) == 4981
    assert all(held_out.isdisjoint(training.keys(document.text)) for document in documents)
