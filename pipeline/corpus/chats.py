"""Chats in a corpus's rows: contents, reasoning, tool calls and tools, in the forms that data sets use."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.tokenization.chat_template import ASSISTANT
from pipeline.tokenization.chat_template import Message as PlainMessage
from pipeline.tokenization.conversation import Conversation, Message, says_something, split_reasoning, with_ids

_REASONING = ("reasoning_content", "reasoning", "thinking")  # the names of DeepSeek and Qwen, of OpenRouter, of gpt-oss
_MAX_DEPTH = 64  # levels of an argument or a schema; deeper ones would hit Python's recursion limit
_UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content")  # unusable with `turns: contents`
_OTHERWISE = "; where the column `tools` holds something else, corpus.turns: contents goes without it"


class UnusableError(ValueError):
    """A row cannot be used as a document; the message is the reason."""


class Chat(NamedTuple):
    """A row's chat.

    Attributes:
        messages: role and content of each; a message without content has an empty one.
        conversation: the same with reasoning, calls and tools; None for a chat of contents only.
    """

    messages: tuple[PlainMessage, ...]
    conversation: Conversation | None

    @property
    def last_turn(self) -> tuple[int, ...]:
        """Return the number of the last message in which the assistant says something."""
        messages: Sequence[Mapping[str, Any]] = (
            self.messages if self.conversation is None else self.conversation.messages
        )
        return tuple(index for index, message in enumerate(messages) if says_something(message))[-1:]

    def before_answer(self) -> "Chat":
        """Return the chat up to the last message that is not the assistant's. Raises UnusableError if there is none."""
        others = [index for index, message in enumerate(self.messages) if message["role"] != ASSISTANT]
        if not others:
            raise UnusableError("a prompt without a message that the assistant could answer")
        stop = others[-1] + 1
        return Chat(self.messages[:stop], self.conversation and self.conversation.until(stop))

    @property
    def assistant_text(self) -> str:
        """Return all that the assistant says, including its reasoning and calls."""
        if self.conversation is None:
            return "".join(message["content"] for message in self.messages if message["role"] == ASSISTANT)
        return "".join(
            message.get("reasoning", "") + message["content"] + "".join(map(_as_json, message.get("tool_calls", ())))
            for message in self.conversation.messages
            if message["role"] == ASSISTANT
        )


def read_chat(columns: Mapping[str, Any], config: CorpusConfig) -> Chat:
    """Read the chat of a row. Raises UnusableError."""
    if config.messages is not None:
        roles = [role for role in ("system", "user", ASSISTANT) if role in config.messages]
        messages: Any = [{"role": role, "content": column(columns, config.messages[role])} for role in roles]
    else:
        messages = column(columns, config.field)
    if not isinstance(messages, list) or not messages:
        raise UnusableError("field 'messages' is not a list of messages")
    if config.turns == "contents":
        chat = Chat(tuple(_content(message, config.strip) for message in messages), None)
    else:
        chat = _rendered([_message(message, config) for message in messages], _tools(columns.get("tools")))
    if not config.answered:
        return chat.before_answer()
    if not chat.assistant_text:
        raise UnusableError("the assistant says nothing")
    return chat


def column(columns: Mapping[str, Any], name: str) -> Any:
    """Return a row's value in a column. Raises UnusableError if there is no such column."""
    if name not in columns:
        raise UnusableError(f"no field {name!r}")
    return columns[name]


def _content(message: Any, strip: bool) -> PlainMessage:
    """Return role and content of a message that has nothing else."""
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise UnusableError("a message has no role and content that are text")
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise UnusableError(f"a message has {key} beside its content")
    if not message["role"] + message["content"]:
        raise UnusableError("empty text")
    _utf8(message["role"] + message["content"])
    return {"role": message["role"], "content": message["content"].strip() if strip else message["content"]}


def _rendered(messages: list[Message], tools: tuple[Mapping[str, Any], ...]) -> Chat:
    """Make a chat, with a conversation if there is more than contents.

    A content that holds its reasoning counts as more, because a template may move it out.
    """
    contents = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    beside = any(message.get("reasoning") or message.get("tool_calls") for message in messages)
    inside = any(m["role"] == ASSISTANT and split_reasoning(m["content"]) for m in messages)
    return Chat(contents, Conversation(with_ids(messages), tools) if beside or inside or tools else None)


def _message(message: Any, config: CorpusConfig) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise UnusableError("a message has no role and content that are text")
    role = "tool" if message["role"] == "function" else message["role"]
    reasoning, calls = _reasoning(message), _calls(message)
    if role != ASSISTANT and (reasoning or calls):
        raise UnusableError("a message that is not the assistant's has reasoning or calls a tool")
    content = message.get("content")
    if content is None and (reasoning or calls):
        content = ""
    if not isinstance(content, str):
        raise UnusableError("a message has no role and content that are text")
    if role == ASSISTANT and config.reasoning == "drop":
        split = split_reasoning(content)
        reasoning, content = "", content if split is None else split[1]
    if config.strip:
        content, reasoning = content.strip(), reasoning.strip()
    made: dict[str, Any] = {"role": role, "content": content}
    made |= {"reasoning": reasoning} if reasoning else {}
    made |= {"tool_calls": calls} if calls else {}
    if role == "tool":
        made |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    _utf8(_as_json(made))
    return made


def _reasoning(message: Mapping[str, Any]) -> str:
    """Return a message's reasoning; empty if it has none."""
    reasoning = next((message[key] for key in _REASONING if message.get(key)), "")
    if not isinstance(reasoning, str):
        raise UnusableError("a message's reasoning is not text")
    return reasoning


def _calls(message: Mapping[str, Any]) -> list[Message]:
    """Return a message's tool calls, each with `name`, `arguments` and, if it has one, `id`."""
    calls = message.get("tool_calls")
    if message.get("function_call"):  # OpenAI's older form
        calls = [message["function_call"]]
    calls = _parsed(calls, "a message's tool_calls are not JSON") if isinstance(calls, str) and calls else calls
    if not calls:
        return []
    if not isinstance(calls, list):
        raise UnusableError("a message's tool_calls are not a list")
    return [_call(call) for call in calls]


def _call(call: Any) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnusableError("a tool call has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = _parsed(arguments, "a tool call's arguments are not JSON")
    elif not _is_deep(arguments) and _holds_null(arguments):  # Parquet gives every call the keys of all others
        raise UnusableError("a tool call's arguments hold nulls; give them as JSON text")
    if arguments in (None, "") and "arguments" in function:  # how data sets write a call without arguments
        arguments = {}
    if not isinstance(arguments, dict):
        raise UnusableError("a tool call's arguments are not an object")
    if _is_deep(arguments):
        raise UnusableError(f"a tool call's arguments are nested deeper than {_MAX_DEPTH} levels")
    name = call.get("id")
    return {
        **({"id": name} if isinstance(name, str) and name else {}),
        "name": function["name"],
        "arguments": arguments,
    }


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return a row's tools, in the form that templates receive them."""
    if isinstance(value, str) and value:
        value = _parsed(value, f"the tools are not JSON{_OTHERWISE}")
    elif not _is_deep(value) and _holds_null(value):
        raise UnusableError(f"the tools hold nulls; give them as JSON text{_OTHERWISE}")
    if not value:
        return ()
    if not isinstance(value, list):
        raise UnusableError(f"the tools are not a list{_OTHERWISE}")
    tools = [_parsed(tool, f"a tool is not JSON{_OTHERWISE}") if isinstance(tool, str) else tool for tool in value]
    if _is_deep(tools):
        raise UnusableError(f"the tools are nested deeper than {_MAX_DEPTH} levels")
    made = [
        tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
    if not all(isinstance(t["function"], dict) and isinstance(t["function"].get("name"), str) for t in made):
        raise UnusableError(f"a tool has no name{_OTHERWISE}")
    _utf8(_as_json(made))
    return tuple(made)


def _parsed(text: str, fault: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        raise UnusableError(fault) from error


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested deeper than `_MAX_DEPTH` levels."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return any(item is None or _holds_null(item) for item in items)
    return False


def _as_json(value: Any) -> str:
    """Serialise a value. Raises UnusableError for NaN and infinity, which Python's JSON reader accepts."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UnusableError("a call or a tool holds a number that is NaN or infinite, which is no JSON") from error


def _utf8(text: str) -> None:
    """Raise UnusableError for half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError("half of a surrogate pair") from error
