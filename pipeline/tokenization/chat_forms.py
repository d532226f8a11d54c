"""In which form a chat template takes what stands beside a content: found out by asking it.

There is no one form. Reasoning is a key of the message, the beginning of its content, or a part of it; arguments are an
object or JSON text; a message that only calls has no content or an empty one; some want ids of nine letters. A form is
right where the template writes what it was given, once.
"""

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from pipeline.tokenization.chat_template import ASSISTANT, ChatError
from pipeline.tokenization.conversation import Conversation, Message, join_reasoning

Render = Callable[[list[dict[str, Any]], list[Any]], str]  # messages and tools, as a template is given them

_KEYS = ("reasoning_content", "reasoning", "thinking")  # what templates call it; each reads one of them
_MARK = "\ue0a0{}\ue0a1"
_QUESTION = {"role": "user", "content": "Is it there?"}
_TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


def mark(number: int) -> str:
    """A text that no template writes by itself, or strips."""
    return _MARK.format(number)


class Forms(NamedTuple):
    """How a template wants a message.

    Attributes:
        reasoning: `key`, `content` (in <think> tags at its beginning) or `part` (of a content that is a list); None: it
            writes none.
        calls: whether it writes calls of tools at all; the others say how it wants them.
        arguments_as_text: as JSON text, where it does not take an object.
        no_content: what it takes for a content where only tools are called.
        short_ids: ids of nine letters and digits, and no others.
        tools: whether it writes the tools that it is offered.
    """

    reasoning: str | None = None
    calls: bool = True
    arguments_as_text: bool = False
    no_content: str | None = ""
    short_ids: bool = False
    tools: bool = True

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """A conversation's messages as the template is given them."""
        short = _short_ids(conversation.messages) if self.short_ids else {}
        return [self._message(message, short) for message in conversation.messages]

    def _message(self, message: Message, short: dict[str, str]) -> dict[str, Any]:
        made: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        reasoning, calls = message.get("reasoning"), message.get("tool_calls")
        if reasoning and self.reasoning == "key":
            made |= dict.fromkeys(_KEYS, reasoning)
        elif reasoning and self.reasoning == "content":
            made["content"] = join_reasoning(reasoning, message["content"])
        elif reasoning and self.reasoning == "part":
            said = [{"type": "text", "text": message["content"]}] if message["content"] else []
            made["content"] = [{"type": "thinking", "thinking": reasoning}, *said]
        if calls:
            made["content"] = made["content"] or self.no_content
            made["tool_calls"] = [self._call(call, short) for call in calls]
        for name in ("name", "tool_call_id"):
            if message.get(name):
                made[name] = short.get(message[name], message[name])
        return made

    def _call(self, call: Message, short: dict[str, str]) -> dict[str, Any]:
        arguments = call["arguments"]
        text = json.dumps(arguments, ensure_ascii=False) if self.arguments_as_text else arguments
        name = short.get(call["id"], call["id"])
        return {"id": name, "type": "function", "function": {"name": call["name"], "arguments": text}}

    @classmethod
    def of(cls, render: Render, source: str) -> "Forms":
        """The forms of a template. `source` is its text."""
        tools = mark(0) in _asked(render, [_QUESTION], [{"type": "function", "function": {**_TOOL, "name": mark(0)}}])
        return _calling(render, cls(reasoning=_reasoning(render, source), tools=tools))


def _asked(render: Render, messages: list[dict[str, Any]], tools: Sequence[Any] = ()) -> str:
    """What the template writes; nothing where it refuses."""
    try:
        return render(messages, list(tools))
    except ChatError:
        return ""


def _reasoning(render: Render, source: str) -> str | None:
    answer = {"role": ASSISTANT, "content": "Yes.", "reasoning": mark(0)}
    for form in ("key", "content", "part"):
        if (
            form != "key" and "think" not in source
        ):  # any template writes whatever stands in a content; these look for it there
            continue
        text = _asked(render, Forms(reasoning=form).messages(Conversation((_QUESTION, answer))))
        if text.count(mark(0)) == 1:
            return form
    return None


def _calling(render: Render, forms: Forms) -> Forms:
    """With the form of calls. The likeliest first: ids as they are, an object, an empty content."""
    for short_ids, as_text, empty in product((False, True), (False, True), ("", None)):
        tried = forms._replace(short_ids=short_ids, arguments_as_text=as_text, no_content=empty)
        call = {"id": "call_of_more_than_nine", "name": mark(0), "arguments": {"where": mark(1)}}
        asked = Conversation((_QUESTION, {"role": ASSISTANT, "content": "", "tool_calls": [call]}))
        text = _asked(render, tried.messages(asked))
        written = text[text.find(_QUESTION["content"]) :]
        as_json = f'\\"{mark(1)}' in text  # text that was taken for an object, and written as JSON once more
        if text.count(mark(0)) == text.count(mark(1)) == 1 and "None" not in written and not as_json:
            return tried
    return forms._replace(calls=False)


def _short_ids(messages: Sequence[Message]) -> dict[str, str]:
    """Ids of nine letters and digits by the conversation's own; those that are such already stay."""
    names = dict.fromkeys(call["id"] for message in messages for call in message.get("tool_calls", ()))
    kept = {name for name in names if len(name) == 9 and name.isalnum() and name.isascii()}
    free = (made for made in (f"call{number:05d}" for number in range(len(names) + len(kept))) if made not in kept)
    return {name: name if name in kept else next(free) for name in names}
