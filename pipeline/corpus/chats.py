"""Chats out of a corpus's rows: contents, and what data sets put beside them, in the forms that they have for it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.config import CorpusConfig
from pipeline.tokenization.chat_template import ASSISTANT
from pipeline.tokenization.chat_template import Message as Said
from pipeline.tokenization.conversation import Conversation, Message, split_reasoning, with_ids

_REASONING = ("reasoning_content", "reasoning", "thinking")  # DeepSeek's and Qwen's name, OpenRouter's, gpt-oss's
_DEEPEST = 64  # levels of an argument or a schema: further in, Python's own limit ends the run
_UNHELD = ("tool_calls", "function_call", "reasoning_content")  # with contents alone, what makes a chat unusable
_OTHERWISE = "; where the column `tools` holds something else, corpus.turns: contents goes without it"


class UnusableError(ValueError):
    """Why a row is not a document."""


class Chat(NamedTuple):
    """A row's chat.

    Attributes:
        messages: role and content of each; a message without content has an empty one.
        conversation: the same with what stands beside; None for a chat of contents alone.
    """

    messages: tuple[Said, ...]
    conversation: Conversation | None

    @property
    def said(self) -> str:
        """All that the assistant says, its reasoning and its calls too."""
        if self.conversation is None:
            return "".join(message["content"] for message in self.messages if message["role"] == ASSISTANT)
        return "".join(
            message.get("reasoning", "") + message["content"] + "".join(map(_as_json, message.get("tool_calls", ())))
            for message in self.conversation.messages
            if message["role"] == ASSISTANT
        )


def read_chat(columns: Mapping[str, Any], config: CorpusConfig) -> Chat:
    """The chat of a row. Raises UnusableError."""
    if config.messages is not None:
        roles = [role for role in ("system", "user", ASSISTANT) if role in config.messages]
        found: Any = [{"role": role, "content": column(columns, config.messages[role])} for role in roles]
    else:
        found = column(columns, config.field)
    if not isinstance(found, list) or not found:
        raise UnusableError("field 'messages' is not a list of messages")
    if config.turns == "contents":
        chat = Chat(tuple(_content(message, config.strip) for message in found), None)
    else:
        chat = _rendered([_message(message, config) for message in found], _tools(columns.get("tools")))
    if not chat.said:
        raise UnusableError("the assistant says nothing")
    return chat


def column(columns: Mapping[str, Any], name: str) -> Any:
    """A row's value. Raises UnusableError."""
    if name not in columns:
        raise UnusableError(f"no field {name!r}")
    return columns[name]


def _content(message: Any, strip: bool) -> Said:
    """Role and content of a message that has nothing else."""
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise UnusableError("a message has no role and content that are text")
    for key in _UNHELD:
        if message.get(key):
            raise UnusableError(f"a message has {key} beside its content")
    if not message["role"] + message["content"]:
        raise UnusableError("empty text")
    _utf8(message["role"] + message["content"])
    return {"role": message["role"], "content": message["content"].strip() if strip else message["content"]}


def _rendered(messages: list[Message], tools: tuple[Mapping[str, Any], ...]) -> Chat:
    """With a conversation where there is more than contents, or a content that holds its reasoning, which a template
    may take out.
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
    """A message's reasoning; empty where it has none."""
    found = next((message[key] for key in _REASONING if message.get(key)), "")
    if not isinstance(found, str):
        raise UnusableError("a message's reasoning is not text")
    return found


def _calls(message: Mapping[str, Any]) -> list[Message]:
    """Calls of tools, each with `name`, `arguments` and, where it has one, `id`."""
    found = message.get("tool_calls")
    if message.get("function_call"):  # what OpenAI had before
        found = [message["function_call"]]
    found = _parsed(found, "a message's tool_calls are not JSON") if isinstance(found, str) and found else found
    if not found:
        return []
    if not isinstance(found, list):
        raise UnusableError("a message's tool_calls are not a list")
    return [_call(call) for call in found]


def _call(call: Any) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnusableError("a tool call has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = _parsed(arguments, "a tool call's arguments are not JSON")
    elif not _is_deep(arguments) and _holds_null(arguments):  # Parquet's columns give every call the keys of all others
        raise UnusableError("a tool call's arguments hold nulls; give them as JSON text")
    if arguments in (None, "") and "arguments" in function:  # as data sets write the call of a tool that takes none
        arguments = {}
    if not isinstance(arguments, dict):
        raise UnusableError("a tool call's arguments are not an object")
    if _is_deep(arguments):
        raise UnusableError(f"a tool call's arguments are nested deeper than {_DEEPEST} levels")
    name = call.get("id")
    return {
        **({"id": name} if isinstance(name, str) and name else {}),
        "name": function["name"],
        "arguments": arguments,
    }


def _tools(found: Any) -> tuple[Mapping[str, Any], ...]:
    """A row's tools, as templates are given them."""
    if isinstance(found, str) and found:
        found = _parsed(found, f"the tools are not JSON{_OTHERWISE}")
    elif not _is_deep(found) and _holds_null(found):
        raise UnusableError(f"the tools hold nulls; give them as JSON text{_OTHERWISE}")
    if not found:
        return ()
    if not isinstance(found, list):
        raise UnusableError(f"the tools are not a list{_OTHERWISE}")
    tools = [_parsed(tool, f"a tool is not JSON{_OTHERWISE}") if isinstance(tool, str) else tool for tool in found]
    if _is_deep(tools):
        raise UnusableError(f"the tools are nested deeper than {_DEEPEST} levels")
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
    raise ValueError(f"{name} is no JSON")


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in one another on more than `_DEEPEST` levels."""
    level = [value]
    for _ in range(_DEEPEST + 1):
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
    """Raises UnusableError for a number that JSON has no word for, which Python's own reader of JSONL lets pass."""
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
