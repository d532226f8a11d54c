"""The bytes that models of several tokenizers and templates are scored on."""

import pytest

from stage2_student.evaluation import bits_per_byte
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Spelled, TextTokens, common_spans
from tests.support.chats import CHAT_FAMILIES, chat, load_chat
from tests.support.tiny import MERGES


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
