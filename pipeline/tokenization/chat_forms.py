"""Forms in which a chat template accepts reasoning, tool calls and tools, found by probing it.

There is no common form. Reasoning is a key of the message, the beginning of its content, or a part of it; arguments are
an object or JSON text; a message that only calls tools has no content or an empty one; some templates require ids of
nine characters. A form is right if the template writes what it was given exactly once.
"""

import json
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from pipeline.tokenization.chat_template import ASSISTANT, ChatError
from pipeline.tokenization.conversation import Conversation, Message, join_reasoning

Render = Callable[[list[dict[str, Any]], list[Any]], str]  # messages and tools, as a template receives them

_KEYS = ("reasoning_content", "reasoning", "thinking")  # names in templates; each template reads one of them
_MARK = "\ue0a0{}\ue0a1"
_QUESTION = {"role": "user", "content": "Is it there?"}
_TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


def mark(number: int) -> str:
    """Return a text that no template writes by itself or strips."""
    return _MARK.format(number)


class Forms(NamedTuple):
    """Form in which a template accepts messages.

    Attributes:
        reasoning: `key`, `content` (in <think> tags at its beginning) or `part` (of a content that is a list); None: it
            writes none.
        calls: whether it writes tool calls at all; the next three say in which form.
        arguments_as_text: as JSON text, if it does not accept an object.
        no_content: the content of a message that only calls tools.
        short_ids: whether it accepts only ids of nine letters and digits.
        tools: whether it writes the tools that it is offered.
    """

    reasoning: str | None = None
    calls: bool = True
    arguments_as_text: bool = False
    no_content: str | None = ""
    short_ids: bool = False
    tools: bool = True

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Return a conversation's messages in the template's form."""
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
            content = [{"type": "text", "text": message["content"]}] if message["content"] else []
            made["content"] = [{"type": "thinking", "thinking": reasoning}, *content]
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
        """Find the forms of a template; `source` is its text."""
        tools = mark(0) in _probed(render, [_QUESTION], [{"type": "function", "function": {**_TOOL, "name": mark(0)}}])
        return _calling(render, cls(reasoning=_reasoning(render, source), tools=tools))


def _probed(render: Render, messages: list[dict[str, Any]], tools: Sequence[Any] = ()) -> str:
    """Return what the template writes; empty if it refuses."""
    try:
        return render(messages, list(tools))
    except ChatError:
        return ""


def _reasoning(render: Render, source: str) -> str | None:
    answer = {"role": ASSISTANT, "content": "Yes.", "reasoning": mark(0)}
    for form in ("key", "content", "part"):
        # Any template writes whatever is in a content; only those that mention thinking look for reasoning there.
        if form != "key" and "think" not in source:
            continue
        text = _probed(render, Forms(reasoning=form).messages(Conversation((_QUESTION, answer))))
        if text.count(mark(0)) == 1:
            return form
    return None


def _calling(render: Render, forms: Forms) -> Forms:
    """Add the form of calls. The likeliest is tried first: ids as they are, an object, an empty content."""
    for short_ids, as_text, empty in product((False, True), (False, True), ("", None)):
        tried = forms._replace(short_ids=short_ids, arguments_as_text=as_text, no_content=empty)
        call = {"id": "call_of_more_than_nine", "name": mark(0), "arguments": {"where": mark(1)}}
        probe = Conversation((_QUESTION, {"role": ASSISTANT, "content": "", "tool_calls": [call]}))
        text = _probed(render, tried.messages(probe))
        written = text[text.find(_QUESTION["content"]) :]
        as_json = f'\\"{mark(1)}' in text  # text that was taken for an object and encoded as JSON again
        if text.count(mark(0)) == text.count(mark(1)) == 1 and "None" not in written and not as_json:
            return tried
    return forms._replace(calls=False)


def _short_ids(messages: Sequence[Message]) -> dict[str, str]:
    """Map the conversation's ids to ids of nine letters and digits; ids that already fit stay."""
    names = dict.fromkeys(call["id"] for message in messages for call in message.get("tool_calls", ()))
    kept = {name for name in names if len(name) == 9 and name.isalnum() and name.isascii()}
    free = (made for made in (f"call{number:05d}" for number in range(len(names) + len(kept))) if made not in kept)
    return {name: name if name in kept else next(free) for name in names}
