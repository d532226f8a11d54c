"""What a chat template writes for a turn of the assistant, and where in its rendering that stands.

A turn is what lies between the generation prompt and the token that ends the turn: what is said, the reasoning, the calls, and what the
template writes around them. It is seen as the model would have seen it when it came: the chat is rendered up to that turn, as many
templates drop or strip it later. Turns whose renderings begin one another are in one rendering, so that it serves them all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from pipeline.chat_forms import Forms, mark
from pipeline.chat_template import ASSISTANT, ChatError, ChatTemplate, Part
from pipeline.control_tokens import ControlTokens, Found, mended
from pipeline.conversation import Conversation, Excerpt, Message


@dataclass(frozen=True)
class Turn:
    """A chat rendered up to a turn, which is characters `begin .. end` of it, and ends with the control token `end_token` up to `stop`.

    Attributes:
        text: the rendering, in which spellings of control tokens are broken.
        number: how many such control tokens stand before that one.
    """

    text: str
    begin: int
    end: int
    stop: int
    end_token: int
    number: int

    def begins(self, later: "Turn") -> bool:
        """Whether a later turn's rendering holds this one as it is."""
        return later.text.startswith(self.text[: self.stop])

    def within(self, later: "Turn", controls: Sequence[Found]) -> "Turn":
        """Where this turn stands in a later one's rendering, whose control tokens these are. Raises ChatError where it does not.

        What comes before it may have changed, and so may what the template writes before it (an empty reasoning, by some): the turn is
        known by its text, and by the control token that ends it.
        """
        if self.begins(later):
            return replace(self, text=later.text)
        ends = [found for found in controls if found.token == self.end_token]
        end = ends[self.number] if self.number < len(ends) else None
        if end is None or not later.text[: end.start].endswith(self.text[self.begin : self.end]):
            raise ChatError("the chat template writes an earlier turn otherwise once the chat goes on")
        return replace(self, text=later.text, begin=end.start - (self.end - self.begin), end=end.start, stop=end.end)


class Written(NamedTuple):
    """An excerpt as the template writes it.

    Attributes:
        items: control tokens by id, and what stands between them; each turn's parts have its number in the excerpt.
        contents: of each message of the excerpt its text: of the assistant's what is written for the turn, without control tokens.
    """

    items: list[int | Part]
    contents: tuple[str, ...]


class TurnTemplate:
    """A chat template asked about turns.

    Args:
        end: the control token that ends a turn; where it does not come, the last one does.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, end: int | None) -> None:
        self._template, self._control, self._end = template, control, end
        self._written_whole: set[tuple[Any, ...]] = set()

    @cached_property
    def forms(self) -> Forms:
        """In which form it takes reasoning and calls."""
        return Forms.of(self._template.apply, self._template.source)

    def seen(self, conversation: Conversation) -> Conversation:
        """A conversation as this template is to see it: with reasoning apart from contents, if it knows of reasoning."""
        return conversation if self.forms.reasoning is None else conversation.with_reasoning_apart()

    def excerpts(self, conversation: Conversation) -> Iterator[Excerpt]:
        """The fewest records that hold each turn as the model saw it, and after one another all messages up to the last turn.

        Raises ChatError.
        """
        done, turns = 0, conversation.turns
        if not turns:
            raise ChatError("the assistant says nothing")
        rendered = [self.turn(conversation.until(index + 1)) for index in turns]
        for (one, index), (other, later) in pairwise(zip(rendered, turns, strict=True)):
            alike = _reasons(conversation.messages[index]) == _reasons(conversation.messages[later])
            if not (alike and one.begins(other)):
                yield Excerpt(conversation.until(index + 1), index + 1 - done)
                done = index + 1
        yield Excerpt(conversation.until(turns[-1] + 1), turns[-1] + 1 - done)

    def write(self, excerpt: Excerpt) -> Written:
        """Raises ChatError where the template does not write each of its turns whole and as it was."""
        conversation, first = self.seen(excerpt.conversation), len(excerpt.conversation.messages) - excerpt.num_messages
        spoken = [index for index in conversation.turns if index >= first]
        rendered = {index: self.turn(conversation.until(index + 1)) for index in spoken}
        whole = rendered[spoken[-1]]
        controls = list(self._control.find(whole.text[: whole.stop]))
        turns = {index: turn.within(whole, controls) for index, turn in rendered.items()}
        items: list[int | Part] = []
        contents = dict.fromkeys(spoken, "")
        at = 0
        for found in controls:
            items += _parts(whole.text, at, found.start, turns, first, contents)
            items.append(found.token)
            at = found.end
        said = enumerate(conversation.messages[first:], start=first)
        return Written(items, tuple(contents.get(i, "" if m["role"] == ASSISTANT else m["content"]) for i, m in said))

    def turn(self, conversation: Conversation) -> Turn:
        """The last message, the assistant's. Raises ChatError."""
        self._require_forms(conversation)
        last, before = conversation.messages[-1], conversation.until(len(conversation.messages) - 1)
        text = self._rendered(conversation, last)
        controls = list(self._control.find(text))
        begin = self._begin(text, controls, before, last)
        after = [found for found in controls if found.start >= begin]
        if not after:
            raise ChatError("the chat template writes no control token after what the assistant says")
        end = next((found for found in after if found.token == self._end), after[-1])
        number = sum(found.token == end.token and found.start < end.start for found in controls)
        turn = Turn(text, begin, end.start, end.end, end.token, number)
        self._require_whole(conversation, mended(text[begin : end.start]))
        return turn

    def _begin(self, text: str, controls: Sequence[Found], before: Conversation, last: Message) -> int:
        """Where the turn begins: after the generation prompt, or else after the last control token that both of them have."""
        prompt = self._rendered(before, last, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        common = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
        shared = [found.end for found in controls if found.end <= common]
        context = self._rendered(before, last)
        # What is between that token and the turn would be taken for the turn's: it has to come after all that was said before.
        if not shared or not (text.startswith(context) and len(context) < shared[-1]):
            raise ChatError("the chat template begins a turn otherwise than its generation prompt does")
        return shared[-1]

    def _rendered(self, conversation: Conversation, last: Message, prompt: bool = False) -> str:
        """The conversation, with spellings of control tokens broken.

        Args:
            last: the turn that it is rendered for: templates are told whether there is reasoning in it.
            prompt: with the prompt for that turn.
        """
        reasons = _reasons(last)

        def written(messages: list[dict[str, Any]], tools: list[Any]) -> str:
            options = {"enable_thinking": reasons, "thinking": reasons, "add_generation_prompt": prompt}
            return self._template.apply(messages, tools, options)

        given = self.forms.messages(conversation), list(conversation.tools)
        broken = self._control.broken(given[0]), self._control.broken(given[1])
        text = written(*broken)
        if broken != given and mended(text) != written(*given):
            raise ChatError("the chat template's own text depends on what the messages say")
        return text

    def _require_forms(self, conversation: Conversation) -> None:
        """Raise ChatError where the template knows no form for what the last message has."""
        last, forms = conversation.messages[-1], self.forms
        if last.get("reasoning") and forms.reasoning is None:
            raise ChatError(
                "the chat template leaves out the reasoning",
                "the chat template leaves out the reasoning; drop it with corpus.reasoning: drop, or give another template",
            )
        if any(message.get("tool_calls") for message in conversation.messages) and not forms.calls:
            raise ChatError("the chat template leaves out calls of tools")
        if conversation.tools and not forms.tools:
            raise ChatError("the chat template leaves out the tools")

    def _require_whole(self, conversation: Conversation, written: str) -> None:
        """Raise ChatError unless all that the last message has stands in what is written for the turn."""
        last = conversation.messages[-1]
        self._require_written(conversation, last)
        said = [last["content"].strip(), (last.get("reasoning") or "").strip()]
        called = [text for call in last.get("tool_calls", ()) for text in (call["name"], *_texts(call["arguments"]))]
        changed = [text for text in said if text not in written]
        changed += [text for text in called if not any(form in written for form in _spellings(text))]
        if changed:
            raise ChatError(
                "the chat template changes what the assistant says",
                f"the chat template changes what the assistant says: it does not write {changed[0][:40]!r} as it is; leave the chat "
                "out, or give another template",
            )

    def _require_written(self, conversation: Conversation, last: Message) -> None:
        """Raise ChatError unless the template writes each thing once. Asked once for chats of one shape."""
        shape = (
            tuple(
                (m["role"], bool(m["content"]), _reasons(m), len(m.get("tool_calls", ())))
                for m in conversation.messages
            ),
            bool(conversation.tools),
        )
        if shape in self._written_whole:
            return
        marked, names = _marked(last)
        text = self._rendered(replace(conversation, messages=(*conversation.messages[:-1], marked)), last)
        for number, name in enumerate(names):
            if text.count(mark(number)) != 1:
                what = "leaves out" if mark(number) not in text else "repeats"
                raise ChatError(f"the chat template {what} {name}")
        self._written_whole.add(shape)


def _parts(
    text: str, start: int, stop: int, turns: dict[int, Turn], first: int, contents: dict[int, str]
) -> Iterator[Part]:
    """What stands at these characters, cut where a turn begins or ends; the turns' parts are put to their contents."""
    for index, turn in turns.items():
        begin, end = max(start, turn.begin), min(stop, turn.end)
        if begin >= end:
            continue
        if start < begin:
            yield Part(mended(text[start:begin]), None)
        said = mended(text[begin:end])
        yield Part(said, index - first, len(contents[index].encode()))
        contents[index] += said
        start = end
    if start < stop:
        yield Part(mended(text[start:stop]), None)


def _reasons(message: Message) -> bool:
    return bool(message.get("reasoning"))


def _marked(message: Message) -> tuple[Message, list[str]]:
    """The message with a mark in place of each thing that it has, and what these are."""
    names: list[str] = []

    def marked(name: str) -> str:
        names.append(name)
        return mark(len(names) - 1)

    made = dict(message)
    if made["content"]:
        made["content"] = marked("what the assistant says")
    if _reasons(message):
        made["reasoning"] = marked("the reasoning")
    if message.get("tool_calls"):
        made["tool_calls"] = [
            {**call, "name": marked("calls of tools"), "arguments": {"where": marked("calls of tools")}}
            for call in message["tool_calls"]
        ]
    return made, names


def _texts(value: Any) -> Iterator[str]:
    """The texts in the arguments of a call."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _spellings(text: str) -> tuple[str, ...]:
    """As a template may write a text of a call: as it is, or as JSON."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
