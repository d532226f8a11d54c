"""Rendering of a conversation by a chat template, with the place of every message's content.

A template is a program: it adds its own text, and may fold, re-order, strip or drop its input. It is therefore run
twice: with a mark in place of each content, which leaves the template's own text, and with the contents. If the two
agree, every place is known; if not, each message is examined separately. The template may do anything with user and
system messages, but what the assistant says must appear once, byte for byte, and in order: any violation is named.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

Message = dict[str, str]  # role and content

ASSISTANT = "assistant"
# Llama 3's template writes today's date; a dump resumed tomorrow, and its student, must see the same date. This is the
# template's own default.
TODAY = datetime(2024, 7, 26)
_MARK = "\ue0a0{}\ue0a1"  # private use: no template contains it, and none strips it
_MARKS = re.compile("\ue0a0([0-9]+)\ue0a1")


class ChatError(ValueError):
    """A chat cannot be used with a template. `reason` is short, and the same for all chats with that fault."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason


class Part(NamedTuple):
    """Text of a rendering: the template's own (`message` is None), or a message's content as the template writes it.

    `at` is the number of the content's bytes before it, if the template writes control tokens inside the content.
    """

    text: str
    message: int | None
    at: int = 0


class ChatTemplate:
    """The chat template of a transformers tokenizer.

    Attributes:
        source: the template's own text.
        sha256: hex digest of what decides a rendering: the template, the tokenizer's named tokens, the date it sees.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read the template. Raises ValueError for a tokenizer without one, or with several and no default."""
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], list[Part]] = {}
        self.source: str = tokenizer.get_chat_template()
        source = [self.source, tokenizer.special_tokens_map, TODAY.isoformat()]
        self.sha256 = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> list[Part]:
        """Render messages into parts, in order; joined they are the model's input. Raises ChatError with the reason."""
        parts, faults = self.render_any(messages)
        for fault in faults.values():
            raise fault
        return parts

    def render_any(self, messages: Sequence[Message]) -> tuple[list[Part], dict[int, ChatError]]:
        """Render messages as `render` does, but return faults of the assistant's messages by their number.

        The assistant's other messages appear in the rendering once, unchanged and in order. Raises ChatError if the
        places of the contents cannot be found.
        """
        skeleton = self._skeleton(messages)
        parts = _fill(skeleton, [message["content"] for message in messages])
        text = self.apply([*messages], [])
        if "".join(part.text for part in parts) != text:
            parts = _fill(skeleton, [self._written(skeleton, messages, index) for index in range(len(messages))])
            if "".join(part.text for part in parts) != text:
                raise ChatError("the chat template's own text depends on what the messages say")
        return parts, _faults(messages, parts)

    def apply(
        self, messages: list[dict[str, Any]], tools: list[Any], options: Mapping[str, bool] = MappingProxyType({})
    ) -> str:
        """Render messages of any form to text; `options` are variables that the template may read.

        Raises ChatError if the template refuses the messages or fails on them.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, strftime_now=TODAY.strftime, **options
            )
        # Errors of the template's program.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ChatError(f"the chat template refuses it: {error}") from error
        return str(text)

    def _marked(self, messages: Sequence[Message], but: int | None = None) -> str:
        """Render with a mark for each content, except that of message `but`."""
        return self.apply(
            [m if index == but else m | {"content": _MARK.format(index)} for index, m in enumerate(messages)], []
        )

    def _skeleton(self, messages: Sequence[Message]) -> list[Part]:
        """Return the template's text with empty places for contents, the same for all chats with these roles."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            pieces = _MARKS.split(self._marked(messages))
            parts = [Part("", int(piece)) if index % 2 else Part(piece, None) for index, piece in enumerate(pieces)]
            self._skeletons[roles] = [part for part in parts if part.text or part.message is not None]
        return self._skeletons[roles]

    def _written(self, skeleton: Sequence[Part], messages: Sequence[Message], index: int) -> str:
        """Return what the template makes of one message's content. Raises ChatError if that cannot be determined."""
        places = [place for place, part in enumerate(skeleton) if part.message == index]
        if len(places) != 1:
            return messages[index]["content"]  # dropped or repeated: unchanged, or the renderings will differ
        marked = [_MARK.format(part.message) if part.message is not None else part.text for part in skeleton]
        before, after = "".join(marked[: places[0]]), "".join(marked[places[0] + 1 :])
        text = self._marked(messages, but=index)
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
            raise ChatError("the chat template's own text depends on what the messages say")
        return text[len(before) : len(text) - len(after)]


def _fill(skeleton: Sequence[Part], contents: Sequence[str]) -> list[Part]:
    return [part if part.message is None else Part(contents[part.message], part.message) for part in skeleton]


def _faults(messages: Sequence[Message], parts: Sequence[Part]) -> dict[int, ChatError]:
    """Find the assistant's messages that are not rendered once, unchanged and in order: the fault by message number."""
    spoken = [index for index, m in enumerate(messages) if m["role"] == ASSISTANT and m["content"]]
    order = [part.message for part in parts if part.message in spoken]
    faults = {}
    for index in spoken:
        if index not in order:
            faults[index] = ChatError("the chat template leaves out what the assistant says")
    for index in spoken:
        if order.count(index) > 1:
            faults[index] = ChatError("the chat template repeats what the assistant says")
    once = [index for index in order if index not in faults]
    if once != [index for index in spoken if index not in faults]:
        faults |= {
            index: ChatError("the chat template re-orders what the assistant says")
            for index in once
            if index is not None
        }
    for part in parts:
        if part.message in once and part.message not in faults and part.text != messages[part.message]["content"]:
            faults[part.message] = _changed(messages[part.message]["content"], part.text)
    return faults


def _changed(content: str, written: str) -> ChatError:
    stripped = written in (content.strip(), content.lstrip(), content.rstrip())
    what = "strips" if stripped else "changes"
    way_out = "set corpus.strip: true to strip every message before any template sees it" if stripped else ""
    return ChatError(
        f"the chat template {what} what the assistant says",
        f"the chat template {what} what the assistant says: {content[:20]!r}..{content[-20:]!r} becomes "
        f"{written[:20]!r}..{written[-20:]!r}; {way_out or 'leave the chat out, or give another template'}",
    )
