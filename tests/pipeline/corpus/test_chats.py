"""Chats of a corpus: reasoning, calls and tools in the forms that data sets use.

Faulty ones are named.
"""

import json
from typing import Any

import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.chats import Chat, UnusableError, read_chat
from pipeline.tokenization.conversation import Conversation
from tests.support.chats import chat

OTHERWISE = "; where the column `tools` holds something else, corpus.turns: contents goes without it"
CALL = {"type": "function", "id": "call_1", "function": {"name": "look", "arguments": '{"where": "in", "n": null}'}}


def read(messages: list[Any], tools: Any = None, **settings: Any) -> Chat:
    config = CorpusConfig(source="x.jsonl", field="messages", **settings)
    return read_chat({"messages": messages, "tools": tools}, config)


def asked(message: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Read a chat; return its second message."""
    conversation = read([{"role": "user", "content": "the?"}, message], **settings).conversation
    assert conversation is not None
    return dict(conversation.messages[1])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_by_each_name_that_it_has(key: str) -> None:
    message = {"role": "assistant", "content": "and", "reasoning_content": None, key: "so", "tool_calls": None}
    assert asked(message) == {"role": "assistant", "content": "and", "reasoning": "so"}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL["function"], "id": "call_1"}]},
        {
            "tool_calls": [{"id": "call_1", "function": {"name": "look", "arguments": '{"where":"in","n":null}'}}],
            "content": None,
        },
    ],
)
def test_calls_are_the_same_in_each_form(calls: dict[str, Any]) -> None:
    wanted = [{"id": "call_1", "name": "look", "arguments": {"where": "in", "n": None}}]
    assert asked({"role": "assistant", "content": "", **calls}) == {
        "role": "assistant",
        "content": "",
        "tool_calls": wanted,
    }


def test_calls_without_ids_are_answered_in_turn() -> None:
    call = {"name": "look", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "the?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "6"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "look", "content": "8"},
        {"role": "assistant", "content": "and"},
    ]
    found = read(messages).conversation
    assert found is not None
    assert [call["id"] for m in found.messages for call in m.get("tool_calls", ())] == [
        f"call0000{i}" for i in range(3)
    ]
    answers = [(m["tool_call_id"], m["content"]) for m in found.messages if m["role"] == "tool"]
    assert answers == [("call00000", "6"), ("call00001", "7"), ("call00002", "8")]


@pytest.mark.parametrize(
    "tools", [[{"name": "look"}], '[{"type": "function", "function": {"name": "look"}}]', ['{"name": "look"}']]
)
def test_tools_are_the_same_in_each_form_and_make_a_conversation(tools: Any) -> None:
    found = read(chat("the", "and"), tools).conversation
    assert found == Conversation(tuple(chat("the", "and")), ({"type": "function", "function": {"name": "look"}},))
    assert Conversation.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("message", "tools", "fault"),
    [
        ({"tool_calls": [{"name": "look", "arguments": "{where: in}"}]}, None, "a tool call's arguments are not JSON"),
        ({"tool_calls": [{"name": "look", "arguments": "[1]"}]}, None, "a tool call's arguments are not an object"),
        ({"tool_calls": [{"name": "look", "arguments": '{"n": NaN}'}]}, None, "a tool call's arguments are not JSON"),
        ({"tool_calls": [{"name": "look"}]}, None, "a tool call's arguments are not an object"),
        (
            {"tool_calls": [{"name": "look", "arguments": {"where": "in", "n": None}}]},
            None,
            "a tool call's arguments hold nulls; give them as JSON text",
        ),
        ({"tool_calls": [{"arguments": "{}"}]}, None, "a tool call has no name"),
        ({"tool_calls": {"name": "look"}}, None, "a message's tool_calls are not a list"),
        ({"tool_calls": "[{"}, None, "a message's tool_calls are not JSON"),
        ({"reasoning": ["so"]}, None, "a message's reasoning is not text"),
        (
            {"role": "user", "reasoning": "so"},
            None,
            "a message that is not the assistant's has reasoning or calls a tool",
        ),
        ({"content": None}, None, "a message has no role and content that are text"),
        ({"content": "", "reasoning": ""}, None, "the assistant says nothing"),
        ({"reasoning": "\ud800"}, None, "half of a surrogate pair"),
        ({"tool_calls": [{"name": "look", "arguments": '{"a": "\\ud800"}'}]}, None, "half of a surrogate pair"),
        (
            {"tool_calls": [{"name": "look", "arguments": {"n": [float("nan")]}}]},
            None,
            "a call or a tool holds a number that is NaN or infinite, which is no JSON",
        ),
        ({}, "[{", f"the tools are not JSON{OTHERWISE}"),
        ({}, "hammer and saw", f"the tools are not JSON{OTHERWISE}"),
        ({}, ["hammer", "saw"], f"a tool is not JSON{OTHERWISE}"),
        ({}, {"name": "look"}, f"the tools are not a list{OTHERWISE}"),
        (
            {},
            [{"name": "look", "parameters": {"where": None}}],
            f"the tools hold nulls; give them as JSON text{OTHERWISE}",
        ),
        ({}, [{"name": 7}], f"a tool has no name{OTHERWISE}"),
    ],
)
def test_what_is_wrong_with_a_chat_is_named(message: dict[str, Any], tools: Any, fault: str) -> None:
    with pytest.raises(UnusableError) as caught:
        read([{"role": "user", "content": "the?"}, {"role": "assistant", "content": "and", **message}], tools)
    assert str(caught.value) == fault


@pytest.mark.parametrize("arguments", [None, "", "null", "{}", {}])
def test_a_call_that_says_it_has_no_arguments_has_none(arguments: Any) -> None:
    called = asked({"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": arguments}]})
    assert called["tool_calls"] == [{"id": "call00000", "name": "look", "arguments": {}}]


@pytest.mark.parametrize("tools", ["hammer and saw", ["hammer", "saw"], 7])
def test_a_column_of_that_name_that_holds_something_else_is_not_read_with_contents_alone(tools: Any) -> None:
    messages = chat("the", "and")
    with pytest.raises(UnusableError, match=r"corpus\.turns: contents"):
        read(messages, tools)
    assert read(messages, tools, turns="contents") == Chat(tuple(messages), None)


def test_reasoning_is_dropped_wherever_it_stands() -> None:
    rows = [
        {"role": "assistant", "content": "and", "reasoning": "so"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nand"},
        {"role": "assistant", "content": "and"},
    ]
    for row in rows:
        assert read([{"role": "user", "content": "?"}, row], reasoning="drop") == Chat(tuple(chat("?", "and")), None)
    called = asked({"role": "assistant", "content": None, "thinking": "so", "tool_calls": [CALL]}, reasoning="drop")
    assert "reasoning" not in called and called["tool_calls"]
    inside = read([{"role": "user", "content": "?"}, rows[1]])
    assert inside.conversation is not None and inside.conversation.is_plain  # a template may look for it there


def test_contents_alone_are_read_as_they_were_before() -> None:
    plain = chat("the", "<think>so</think>and")
    assert read(plain, [{"name": "look"}], turns="contents") == Chat(tuple(plain), None)
    assert read([plain[0], {**plain[1], "thinking": "so"}], turns="contents") == Chat(tuple(plain), None)
    for key in ("tool_calls", "function_call", "reasoning_content"):
        with pytest.raises(UnusableError, match=f"a message has {key} beside its content"):
            read([plain[0], {**plain[1], key: [CALL]}], turns="contents")
    with pytest.raises(ValueError, match=r"needs corpus\.turns: rendered"):
        CorpusConfig(source="x", field="messages", turns="contents", reasoning="drop")


@pytest.mark.parametrize("levels", [65, 900])
def test_what_is_nested_too_deep_for_any_template_is_unusable(levels: int) -> None:
    nested: Any = "in"
    for _ in range(levels):
        nested = [nested]
    messages = chat("the?", "and")
    with pytest.raises(UnusableError, match="the tools are nested deeper than 64 levels"):
        read(messages, [{"name": "look", "parameters": nested}])
    for arguments in ({"where": nested}, json.dumps({"where": nested})):
        called = {**messages[1], "tool_calls": [{"name": "look", "arguments": arguments}]}
        with pytest.raises(UnusableError, match="arguments are nested deeper than 64 levels"):
            read([messages[0], called])
