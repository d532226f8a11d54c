"""The conversations of a document's records, to be read: what was asked before a turn, reasoning, calls, and the tools
that were offered.
"""

import json
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from pipeline.dumps.glyphs import readable
from pipeline.dumps.view import DumpDocument
from pipeline.tokenization.conversation import Conversation, Message


def conversations(document: DumpDocument) -> list[Any]:
    """Return the column `conversation` of each record in order, as JSON has it; None for a record without. Empty where
    none has one.
    """
    found = [json.loads(record.conversation) if record.conversation else None for record in document.records]
    return found if any(found) else []


def conversation_lines(document: DumpDocument) -> Iterator[Text]:
    """Each conversation that differs from the one before it: its tools, then a line for each of its messages."""
    before = ""
    for record in document.records:
        if not record.conversation or record.conversation == before:
            continue
        before = record.conversation
        found = Conversation.from_json(before)
        learnt = len(record.message_roles)
        yield Text(
            f"conversation of {len(found.messages)} messages, the last {learnt} of which are in the record",
            style="bold",
        )
        if found.tools:
            yield Text(f"  tools: {readable(_plain([tool.get('function', tool) for tool in found.tools]))}")
        yield from map(_message_line, found.messages)


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
