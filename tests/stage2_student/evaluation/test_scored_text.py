"""The bytes that models of several tokenizers and templates are scored on."""

import numpy as np
import pytest

from pipeline.corpus.documents import Document
from pipeline.corpus.regions import TextParts
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.evaluation import bits_per_byte
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Spelled, TextTokens, common_spans
from tests.support.chats import CHAT_FAMILIES, chat, load_chat
from tests.support.tiny import MERGES, tiny_tokenizer


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


def test_of_a_text_the_tokens_inside_its_parts_are_scored_by_any_tokenizer() -> None:
    rng = np.random.default_rng(0)
    readers = [
        Reader(str(number), ByteTokenizer.from_wrapped(tiny_tokenizer(merges), "tiny"), None, 0)
        for number, merges in enumerate((None, ["t h", "i n", "in g", "a n"], []))
    ]
    documents = []
    for _ in range(40):
        text = " ".join(rng.choice(["the", "thing", "and", "é"], size=12)).encode()
        cuts = sorted(rng.choice(len(text) + 1, size=4, replace=False).tolist())
        documents.append(TextParts(text, ((cuts[0], cuts[1]), (cuts[2], cuts[3]))))
    text_scored = scored_text(documents, readers)
    for reader in readers:
        for number, (document, spelled) in enumerate(zip(documents, reader.spell(documents), strict=True)):
            assert isinstance(spelled, Spelled)
            inside, at = set(), 0
            for token in spelled.tokens[1:]:
                end = at + len(reader.tokenizer.token_bytes[token] or b"")
                inside |= set(range(at, end)) if any(a <= at and end <= b for a, b in document.spans) else set()
                at = end
            assert {byte for start, end in spelled.spans for byte in range(start, end)} == inside
            sizes = spelled.token_bytes(text_scored.spans(number, spelled))
            scored = {byte for start, end in text_scored.spans(number, spelled) for byte in range(start, end)}
            assert scored <= inside
            assert int(sizes[sizes > 0].sum()) == len(scored)


def test_of_a_chat_of_which_the_last_turn_is_supervised_that_is_scored() -> None:
    loaded = load_chat("qwen")
    said = chat("the thing?", "and yes", "in?", "a thing")
    document = Document("0", b"", tuple(said), turns=(3,))
    [spelled] = Reader("qwen", loaded.tokenizer, loaded, 0).spell(list(document.texts))
    assert isinstance(spelled, Spelled)
    whole = "".join(message["content"] for message in said)
    assert [whole[start:end] for start, end in spelled.spans] == ["a thing"]
