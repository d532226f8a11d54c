"""Completions: which are kept, how they are cut, and why others are left out."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import GenerateConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation
from stage1_teacher.generation.base import Drawn, drawn
from stage1_teacher.generation.completions import (
    CONTROL,
    CUT_REASONING,
    EMPTY,
    LOOPS,
    NOT_UTF8,
    UNFINISHED,
    LeftOutError,
    make_row,
    read_completion,
    repeats_itself,
)
from stage1_teacher.generation.prompts import Prompt, seed_of
from tests.support.chat_turns import LOOK, load_turns, user
from tests.support.chats import load_chat
from tests.support.tiny import tiny_tokenizer

END, TOKENIZER = 268, ByteTokenizer.from_wrapped(tiny_tokenizer(), "tiny")


def config(**values: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({"path": "x", "prompts": {"source": "y"}, **values})


def writer(chat: ChatTokenizer | None = None) -> Any:
    return SimpleNamespace(tokenizer=TOKENIZER if chat is None else chat.tokenizer, chat=chat)


def tokens_of(content: bytes) -> list[int]:
    """Return the tokens of single bytes."""
    return [TOKENIZER.token_bytes.index(bytes([byte])) for byte in content]


@pytest.mark.parametrize(
    ("content", "ended", "values", "expected"),
    [
        (b" and so", True, {}, (" and so", True)),
        (b" and so", False, {}, (" and so", False)),
        ("né"[:1].encode() + "é".encode()[:1], False, {}, ("n", False)),  # cut off within a character
        (b"a.\nQ: b", True, {"stop": ["\nQ:", "zz"]}, ("a.", False)),
        (b"a\n" + "é".encode()[:1], False, {"stop": ["\n"]}, ("a", False)),
        (b"<|endoftext|> is text", True, {}, ("<|endoftext|> is text", True)),
    ],
)
def test_a_completion_is_what_its_tokens_spell(
    content: bytes, ended: bool, values: dict[str, Any], expected: tuple[str, bool]
) -> None:
    assert read_completion(Drawn(tokens_of(content), ended), writer(), config(**values)) == expected


@pytest.mark.parametrize(
    ("tokens", "ended", "values", "reason"),
    [
        (tokens_of("é".encode()[:1]), True, {}, NOT_UTF8),  # it ended by itself within a character
        (tokens_of("é".encode()[1:]), False, {}, NOT_UTF8),
        (tokens_of(b" \n"), True, {}, EMPTY),
        ([], True, {}, EMPTY),
        (tokens_of(b"\nQ: b"), True, {"stop": ["\nQ:"]}, EMPTY),
        ([*tokens_of(b"and"), END, *tokens_of(b"b")], True, {}, CONTROL),
        ([5, 300_000], True, {}, CONTROL),
        (tokens_of(b"so " + b"ab " * 12), False, {}, LOOPS),
        (tokens_of(b"and so"), False, {"unfinished": "drop"}, UNFINISHED),
    ],
)
def test_a_completion_that_is_no_text_is_left_out_with_the_reason(
    tokens: list[int], ended: bool, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LeftOutError, match=reason):
        read_completion(Drawn(tokens, ended), writer(), config(**values))


def test_an_ended_completion_may_repeat_itself() -> None:
    assert read_completion(Drawn(tokens_of(b"ab " * 30), True), writer(), config()).is_ended


def test_what_follows_the_end_token_is_not_read() -> None:
    assert drawn([5, 6, END, 7], (END,)) == Drawn([5, 6], True)
    assert drawn([5, 6], (END,)) == Drawn([5, 6], False)


def test_loops_are_found_as_by_trying_every_period() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        period, rounds = int(rng.integers(1, 80)), int(rng.integers(1, 8))
        tokens = [*rng.integers(0, 9, rng.integers(0, 20)).tolist(), *(rng.integers(0, 999, period).tolist() * rounds)]
        tokens += tokens[len(tokens) - period :][: int(rng.integers(0, 3))]

        def repeats(p: int, tokens: list[int] = tokens) -> bool:
            k = max(3 * p, 32)
            return len(tokens) >= k + p and all(tokens[-i] == tokens[-i - p] for i in range(1, k + 1))

        assert repeats_itself(tokens) == any(repeats(p) for p in range(1, 65))


def test_a_texts_row_supervises_the_completion_alone() -> None:
    prompt = Prompt("7", (1, 2), text="né ")
    row = make_row(prompt, 2, 5, Drawn(tokens_of("só".encode()), True), writer(), config())
    assert (row.doc_id, row.text, row.completion, row.prompt_id, row.num_tokens) == ("7/2", "né só", 2, "7", 4)
    assert [(s.start, s.length, s.has_end) for s in row.segments] == [(4, 3, True)]


@pytest.fixture(scope="module")
def qwen3() -> ChatTokenizer:
    return load_turns("qwen3")


def answered(chat: ChatTokenizer, said: str, ended: bool = True, tail: str = "", **values: Any) -> dict[str, str]:
    tokens = chat.tokenizer.encode(said.encode())
    conversation = Conversation((user("the?"),), (LOOK,))
    prompt = Prompt("0", (1,), conversation=conversation, tail=tail)
    settings = config(**values)
    settings = settings.model_copy(update={"prompts": settings.prompts.model_copy(update={"field": "messages"})})
    row = make_row(prompt, 0, 5, Drawn(tokens, ended), writer(chat), settings)
    assert row.supervised_messages == (1,)
    assert row.is_finished == ended
    assert '"look"' in row.tools
    return dict(row.messages[-1])


def test_a_chats_reasoning_is_kept_apart_or_dropped(qwen3: ChatTokenizer) -> None:
    said = "<think>\nin and\n</think>\n\nand yes"
    kept = {"role": "assistant", "content": "and yes", "reasoning_content": "in and"}
    assert answered(qwen3, said) == kept
    assert answered(qwen3, said.removeprefix("<think>\n"), tail="assistant\n<think>\n") == kept
    assert answered(qwen3, said, reasoning="drop") == {"role": "assistant", "content": "and yes"}
    assert answered(qwen3, "and yes", ended=False) == {"role": "assistant", "content": "and yes"}


@pytest.mark.parametrize("said", ["<think>\nin and", "<think>\nin and\n</think>\n\n"])
def test_an_answer_that_ends_within_its_reasoning_is_left_out(qwen3: ChatTokenizer, said: str) -> None:
    with pytest.raises(LeftOutError, match=CUT_REASONING):
        answered(qwen3, said, ended=False)


def test_white_space_that_the_template_strips_is_stripped() -> None:
    chat = load_chat("gemma")
    prompt = Prompt("0", (1,), conversation=Conversation((user("the?"),)))
    row = make_row(prompt, 0, 5, Drawn(chat.tokenizer.encode(b"\nand yes\n"), True), writer(chat), config())
    assert row.messages[-1] == {"role": "assistant", "content": "and yes"}
    row = make_row(
        prompt, 0, 5, Drawn(chat.tokenizer.encode(b"\nand yes\n"), True), writer(load_chat("qwen")), config()
    )
    assert row.messages[-1] == {"role": "assistant", "content": "\nand yes\n"}


def test_a_completions_seed_depends_on_its_prompt_and_number_alone() -> None:
    seeds = {seed_of(seed, doc_id, number) for seed in (0, 1) for doc_id in ("1", "11") for number in (0, 1, 10)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
