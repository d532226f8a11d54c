"""Conversations of a document's records on a terminal: earlier messages, reasoning, calls, and available tools."""

import json
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from pipeline.dumps.glyphs import readable
from pipeline.dumps.view import DumpDocument
from pipeline.runtime.format import count_of
from pipeline.tokenization.conversation import Conversation, Message


def conversations(document: DumpDocument) -> list[Any]:
    """Return the column `conversation` of each record in order, as JSON values; None for a record without one.

    Empty if no record has one.
    """
    values = [json.loads(record.conversation) if record.conversation else None for record in document.records]
    return values if any(values) else []


def conversation_lines(document: DumpDocument) -> Iterator[Text]:
    """Yield, for each conversation that differs from the previous one, its tools and a line per message."""
    before = ""
    for record in document.records:
        if not record.conversation or record.conversation == before:
            continue
        before = record.conversation
        conversation = Conversation.from_json(before)
        num_learnt = len(record.message_roles)
        yield Text(
            f"conversation of {count_of(len(conversation.messages), 'message')}, the last {num_learnt} of which "
            "are in the record",
            style="bold",
        )
        if conversation.tools:
            functions = [tool.get("function", tool) for tool in conversation.tools]
            yield Text(f"  tools: {readable(_plain(functions))}")
        yield from map(_message_line, conversation.messages)


def _message_line(message: Message) -> Text:
    parts = [] if not message.get("reasoning") else [f"reasoning {readable(message['reasoning'].encode())}"]
    parts += [readable(message["content"].encode())] if message["content"] else []
    parts += [f"calls {call['name']} {readable(_plain(call['arguments']))}" for call in message.get("tool_calls", ())]
    who = readable(message["role"].encode())
    if message.get("tool_call_id"):
        who += f" to {readable(message['tool_call_id'].encode())}"
    return Text(f"  {who}: ", style="bold").append(" | ".join(parts), style="not bold")


def _plain(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
