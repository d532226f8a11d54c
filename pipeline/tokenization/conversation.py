"""Chats with more than contents: the assistant's reasoning, its tool calls, and the tools it was offered."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline.tokenization.chat_template import ASSISTANT
from schemas.record import Record, RecordText

_HEADS = ("system", "developer")
_OPEN, _CLOSE = "<think>", "</think>"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages and tools of a chat.

    Attributes:
        messages: each with `role` and `content` (text, empty if nothing is said), and optionally `reasoning` (text),
            `tool_calls` (each with `id`, `name` and `arguments`, an object) and, in a tool's answer, `tool_call_id` and
            `name`.
        tools: the tools that the assistant may call, as chat templates receive them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> str:
        """Serialise it as shards store it; equal conversations give equal text."""
        values = {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Parse what `to_json` returns. Raises ValueError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
            raise ValueError(f"{text[:40]!r} is not a conversation: it holds no list of messages")
        return cls(tuple(values["messages"]), tuple(values.get("tools", ())))

    def until(self, stop: int) -> "Conversation":
        """Return the conversation of the first `stop` messages."""
        return replace(self, messages=self.messages[:stop])

    def window(self, first: int, stop: int) -> "Conversation":
        """Return messages `first .. stop`, with the system message if there is one, and the tools."""
        head = self.messages[:1] if first and self.messages[0]["role"] in _HEADS else ()
        return replace(self, messages=(*head, *self.messages[first:stop]))

    def with_reasoning_apart(self) -> "Conversation":
        """Move the reasoning that begins an assistant's content out of it, into `reasoning`."""
        return replace(self, messages=tuple(map(_with_reasoning_apart, self.messages)))

    @property
    def contents(self) -> list[dict[str, str]]:
        """Return role and content of each message."""
        return [{"role": message["role"], "content": message["content"]} for message in self.messages]

    @property
    def is_plain(self) -> bool:
        """Return whether there is nothing beyond the contents."""
        beside = any(message.get("reasoning") or message.get("tool_calls") for message in self.messages)
        return not (beside or self.tools)

    @property
    def turns(self) -> list[int]:
        """Number the messages that are the assistant's and say, reason or call something."""
        return [index for index, message in enumerate(self.messages) if says_something(message)]


class Excerpt(NamedTuple):
    """Content of a record: the last `num_messages` of a conversation, which ends with a turn of the assistant.

    Earlier messages are context.
    """

    conversation: Conversation
    num_messages: int

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return the messages that it holds, without context."""
        return self.conversation.messages[-self.num_messages :]


def says_something(message: Message) -> bool:
    """Return whether a message is the assistant's and not empty."""
    content = message["content"] or message.get("reasoning") or message.get("tool_calls")
    return message["role"] == ASSISTANT and bool(content)


def chat_of(record: RecordText | Record) -> Excerpt | list[dict[str, str]]:
    """Return a record's chat as `ChatTokenizer` takes it. Raises ValueError for a damaged conversation."""
    if not record.conversation:
        return record.messages
    return Excerpt(Conversation.from_json(record.conversation), len(record.message_roles))


def split_reasoning(content: str) -> tuple[str, str] | None:
    """Split a content that begins with <think> ... </think> into (reasoning, rest); None for any other content."""
    text = content.lstrip()
    if not text.startswith(_OPEN) or _CLOSE not in text:
        return None
    reasoning, rest = text.removeprefix(_OPEN).split(_CLOSE, 1)
    return reasoning.strip("\n"), rest.lstrip("\n")


def _with_reasoning_apart(message: Message) -> Message:
    split = split_reasoning(message["content"]) if message["role"] == ASSISTANT else None
    if split is None or message.get("reasoning"):
        return message
    reasoning, content = split
    return {**message, "content": content, **({"reasoning": reasoning} if reasoning else {})}


def join_reasoning(reasoning: str, content: str) -> str:
    """Put the reasoning at the beginning of a content, for templates that look for it there."""
    return f"{_OPEN}\n{reasoning}\n{_CLOSE}\n\n{content}"


def with_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Give each tool call an id, and each answer the id of its call.

    Answers without an id answer the open calls in order.
    """
    made: list[Message] = []
    number, open_ids = 0, list[str]()
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                calls.append({**call, "id": call.get("id") or f"call{number:05d}"})
                number += 1
            message = {**message, "tool_calls": calls}
            open_ids = [call["id"] for call in calls]
        elif message["role"] == "tool":
            answered = message.get("tool_call_id") or next(iter(open_ids), None)
            open_ids = [name for name in open_ids if name != answered]
            message = {**message, **({"tool_call_id": answered} if answered else {})}
        made.append(message)
    return tuple(made)
