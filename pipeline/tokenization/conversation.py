"""A chat with what stands beside its contents: the assistant's reasoning, its calls of tools, and the tools it was
offered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pipeline.tokenization.chat_template import ASSISTANT
from schemas.record import Question, Record

_HEADS = ("system", "developer")
_OPEN, _CLOSE = "<think>", "</think>"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, and tools.

    Attributes:
        messages: each with `role` and `content` (text, empty where nothing is said), and where there is such a thing
            `reasoning` (text), `tool_calls` (each with `id`, `name` and `arguments`, an object), and of a tool's answer
            `tool_call_id` and `name`.
        tools: what the assistant may call, as chat templates are given it.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> str:
        """As a shard keeps it; equal conversations are equal texts."""
        values = {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Raises ValueError for anything but what `to_json` gives."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
            raise ValueError(f"{text[:40]!r} is not a conversation: it holds no list of messages")
        return cls(tuple(values["messages"]), tuple(values.get("tools", ())))

    def until(self, stop: int) -> "Conversation":
        """The first `stop` messages."""
        return replace(self, messages=self.messages[:stop])

    def window(self, first: int, stop: int) -> "Conversation":
        """Messages `first .. stop`, with the system's message, if there is one, and the tools."""
        head = self.messages[:1] if first and self.messages[0]["role"] in _HEADS else ()
        return replace(self, messages=(*head, *self.messages[first:stop]))

    def with_reasoning_apart(self) -> "Conversation":
        """The same with the reasoning that begins a content of the assistant's beside it."""
        return replace(self, messages=tuple(map(_with_reasoning_apart, self.messages)))

    @property
    def contents(self) -> list[dict[str, str]]:
        """Role and content of each message."""
        return [{"role": message["role"], "content": message["content"]} for message in self.messages]

    @property
    def is_plain(self) -> bool:
        """Whether nothing stands beside the contents."""
        beside = any(message.get("reasoning") or message.get("tool_calls") for message in self.messages)
        return not (beside or self.tools)

    @property
    def turns(self) -> list[int]:
        """Which messages are turns of the assistant in which it says, reasons or calls something."""
        return [index for index, message in enumerate(self.messages) if says_something(message)]


class Excerpt(NamedTuple):
    """What a record holds: the last `num_messages` of a conversation, which ends with a turn of the assistant. The
    others are context.
    """

    conversation: Conversation
    num_messages: int

    @property
    def messages(self) -> tuple[Message, ...]:
        """Those that it holds."""
        return self.conversation.messages[-self.num_messages :]


def says_something(message: Message) -> bool:
    """Whether it is the assistant's, and not empty."""
    said = message["content"] or message.get("reasoning") or message.get("tool_calls")
    return message["role"] == ASSISTANT and bool(said)


def chat_of(asked: Question | Record) -> Excerpt | list[dict[str, str]]:
    """A record's chat, as `ChatTokenizer` takes it. Raises ValueError for a conversation that is damaged."""
    if not asked.conversation:
        return asked.messages
    return Excerpt(Conversation.from_json(asked.conversation), len(asked.message_roles))


def split_reasoning(content: str) -> tuple[str, str] | None:
    """(reasoning, the rest) of a content that begins with <think> ... </think>; None for any other."""
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
    """A content that begins with its reasoning, for templates that look for it there."""
    return f"{_OPEN}\n{reasoning}\n{_CLOSE}\n\n{content}"


def with_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Each call with an id, and each answer with that of its call: of those without, the first answer is to the first
    call.
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
