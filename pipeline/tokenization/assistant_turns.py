"""Assistant turns as a chat template writes them, and their places in the rendering.

A turn is everything between the generation prompt and the token that ends the turn: content, reasoning, tool calls, and
the template's text around them. It is rendered as the model would have produced it: the chat is rendered up to that
turn, because many templates drop or strip parts of it later. Turns whose renderings are prefixes of one another share
one rendering.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from pipeline.tokenization.chat_forms import Forms, mark
from pipeline.tokenization.chat_renderings import Turn, Written, gathered, items_of
from pipeline.tokenization.chat_template import ASSISTANT, ChatError, ChatTemplate
from pipeline.tokenization.control_tokens import ControlTokens, Found, mended
from pipeline.tokenization.conversation import Conversation, Excerpt, Message

OTHERWISE = "the chat template writes reasoning or calls otherwise than the teacher's"


class TurnTemplate:
    """View of a chat template by turns.

    Args:
        end: the control token that ends a turn; if it does not occur, the last control token ends it.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, end: int | None) -> None:
        self._template, self._control, self._end = template, control, end
        self._written_whole: set[tuple[Any, ...]] = set()

    @cached_property
    def forms(self) -> Forms:
        """Return the forms in which the template accepts reasoning and calls."""
        return Forms.of(self._template.apply, self._template.source)

    def seen(self, conversation: Conversation) -> Conversation:
        """Return a conversation as this template should see it.

        Reasoning is separated from contents if the template supports reasoning.
        """
        return conversation if self.forms.reasoning is None else conversation.with_reasoning_apart()

    def excerpts(self, conversation: Conversation) -> Iterator[Excerpt]:
        """Yield the fewest records that hold each turn as the model saw it.

        In order, they cover all messages up to the last turn. Raises ChatError.
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

    def prompt(self, conversation: Conversation, reasons: bool) -> str:
        """Render a conversation with the prompt for the assistant's next turn; control tokens' spellings are broken.

        Args:
            reasons: whether the turn is to have reasoning; templates are told.
        Raises ChatError if the template writes no such prompt, or cannot write the conversation.
        """
        answer: Message = {"role": ASSISTANT, "content": mark(0), **({"reasoning": mark(1)} if reasons else {})}
        if self.forms.reasoning is None:
            answer = {"role": ASSISTANT, "content": mark(0)}
        text = self._rendered(conversation, answer, prompt=True)
        whole = self._rendered(replace(conversation, messages=(*conversation.messages, answer)), answer)
        between = whole[len(text) : whole.find(mark(0))] if whole.startswith(text) else None
        if between is None or any(self._control.find(between)):
            raise ChatError("the chat template writes no prompt for the assistant's turn (add_generation_prompt)")
        return text

    def write(self, excerpt: Excerpt) -> Written:
        """Render an excerpt. Raises ChatError unless the template writes each of its turns whole and unchanged."""
        conversation, first = self.seen(excerpt.conversation), len(excerpt.conversation.messages) - excerpt.num_messages
        spoken = [index for index in conversation.turns if index >= first]
        turns = [self.turn(conversation.until(index + 1)) for index in spoken]
        numbers = [index - first for index in spoken]
        renderings = gathered(self._control, numbers, turns)
        if len(renderings) > 1:
            raise ChatError("the chat template writes an earlier turn otherwise once the chat goes on")
        items, contents = items_of(self._control, renderings[0])
        messages = enumerate(conversation.messages[first:])
        texts = (contents.get(i, "" if m["role"] == ASSISTANT else m["content"]) for i, m in messages)
        return Written(items, tuple(text.encode() for text in texts), frozenset(numbers))

    def write_agreeing(
        self, excerpt: Excerpt, stored: Sequence[bytes], numbers: Sequence[int]
    ) -> tuple[list[Written], dict[int, ChatError]]:
        """Render the turns that the template writes with the stored bytes, in the fewest renderings that do so.

        Args:
            stored: the bytes of each message that the excerpt holds.
            numbers: numbers of the messages to render, ascending.
        Returns:
            The renderings, each with some turns spoken, and the fault of each requested message that is in none.
        """
        conversation, first = self.seen(excerpt.conversation), len(excerpt.conversation.messages) - excerpt.num_messages
        agreeing: dict[int, Turn] = {}
        faults: dict[int, ChatError] = {}
        for number in numbers:
            try:
                turn = self.turn(conversation.until(first + number + 1))
            except ChatError as error:
                faults[number] = error
                continue
            if items_of(self._control, {number: turn})[1][number].encode() == stored[number]:
                agreeing[number] = turn
            else:
                faults[number] = ChatError(OTHERWISE)
        renderings = gathered(self._control, list(agreeing), list(agreeing.values()))
        return [Written(items_of(self._control, of)[0], tuple(stored), frozenset(of)) for of in renderings], faults

    def turn(self, conversation: Conversation) -> Turn:
        """Locate the last message, which is the assistant's, in its rendering. Raises ChatError."""
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
        """Find where the turn begins: after the generation prompt, or else after the last control token in common."""
        prompt = self._rendered(before, last, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        common = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
        shared = [found.end for found in controls if found.end <= common]
        context = self._rendered(before, last)
        # Text between that token and the turn would be attributed to the turn, so the token must come after everything
        # said before.
        if not shared or not (text.startswith(context) and len(context) < shared[-1]):
            raise ChatError("the chat template begins a turn otherwise than its generation prompt does")
        return shared[-1]

    def _rendered(self, conversation: Conversation, last: Message, prompt: bool = False) -> str:
        """Render the conversation with spellings of control tokens broken.

        Args:
            last: the turn that it is rendered for; templates are told whether it has reasoning.
            prompt: add the generation prompt for that turn.
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
        """Raise ChatError if the template has no form for something in the last message."""
        last, forms = conversation.messages[-1], self.forms
        if last.get("reasoning") and forms.reasoning is None:
            raise ChatError(
                "the chat template leaves out the reasoning",
                "the chat template leaves out the reasoning; drop it with corpus.reasoning: drop, or give another "
                "template",
            )
        if any(message.get("tool_calls") for message in conversation.messages) and not forms.calls:
            raise ChatError("the chat template leaves out calls of tools")
        if conversation.tools and not forms.tools:
            raise ChatError("the chat template leaves out the tools")

    def _require_whole(self, conversation: Conversation, written: str) -> None:
        """Raise ChatError unless everything in the last message appears in the text written for the turn."""
        last = conversation.messages[-1]
        self._require_written(conversation, last)
        texts = [last["content"].strip(), (last.get("reasoning") or "").strip()]
        called = [text for call in last.get("tool_calls", ()) for text in (call["name"], *_texts(call["arguments"]))]
        changed = [text for text in texts if text not in written]
        changed += [text for text in called if not any(form in written for form in _spellings(text))]
        if changed:
            raise ChatError(
                "the chat template changes what the assistant says",
                f"the chat template changes what the assistant says: it does not write {changed[0][:40]!r} unchanged; "
                "leave the chat out, or give another template",
            )

    def _require_written(self, conversation: Conversation, last: Message) -> None:
        """Raise ChatError unless the template writes each item once. Checked once for all chats of one shape."""
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


def _reasons(message: Message) -> bool:
    return bool(message.get("reasoning"))


def _marked(message: Message) -> tuple[Message, list[str]]:
    """Return the message with a mark in place of each of its items, and the names of these items."""
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
    """Yield the texts in the arguments of a call."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _spellings(text: str) -> tuple[str, ...]:
    """Return the spellings that a template may use for a text of a call: as it is, or as JSON."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
