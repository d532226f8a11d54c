"""A conversation as a chat template writes it, with the place of every message's content.

A template is a program: it adds text of its own, and may fold, re-order, strip or drop what it is given. So it is asked
twice: with a mark in place of each content, which leaves the template's own text, and with the contents. Where the two
agree, every place is known. Where they do not, each message is looked at alone. What becomes of a user's or a system's
message is the template's affair, but what the assistant says must stand there once, byte for byte, and in order:
anything else is named.
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
# Llama 3's template writes today's date; a dump that is resumed tomorrow, and its student, must see the same. This is
# its own default.
TODAY = datetime(2024, 7, 26)
_MARK = "\ue0a0{}\ue0a1"  # private use: in no template, and nothing that a template would strip
_MARKS = re.compile("\ue0a0([0-9]+)\ue0a1")


class ChatError(ValueError):
    """A chat that cannot be used with a template. `reason` is short, and the same for all chats with that fault."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason


class Part(NamedTuple):
    """Text of a rendering: the template's own (`message` is None), or a message's content, as the template writes it.

    `at`: bytes of that content before it, where the template writes control tokens between its parts.
    """

    text: str
    message: int | None
    at: int = 0


class ChatTemplate:
    """The chat template of a transformers tokenizer.

    Attributes:
        source: the template's own text.
        sha256: hex digest of what decides a rendering: the template, the tokenizer's named tokens, the date it is told.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError for a tokenizer without a template, or with several and no default."""
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], list[Part]] = {}
        self.source: str = tokenizer.get_chat_template()
        source = [self.source, tokenizer.special_tokens_map, TODAY.isoformat()]
        self.sha256 = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> list[Part]:
        """The rendering's parts in order; joined they are what the model is given. Raises ChatError, with the
        reason.
        """
        parts, faults = self.render_any(messages)
        for fault in faults.values():
            raise fault
        return parts

    def render_any(self, messages: Sequence[Message]) -> tuple[list[Part], dict[int, ChatError]]:
        """Like `render`, with what is wrong with messages of the assistant's by their number: all others of its
        messages stand in the rendering once, unchanged and in order. Raises ChatError where the places are not known.
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
        """What the template writes for messages of any form; `options` are variables that it may look at.

        Raises ChatError where it refuses them, or fails at them.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, strftime_now=TODAY.strftime, **options
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
        ) as error:  # of the template's program
            raise ChatError(f"the chat template refuses it: {error}") from error
        return str(text)

    def _marked(self, messages: Sequence[Message], but: int | None = None) -> str:
        """The rendering with a mark for each content, but for that of message `but`."""
        return self.apply(
            [m if index == but else m | {"content": _MARK.format(index)} for index, m in enumerate(messages)], []
        )

    def _skeleton(self, messages: Sequence[Message]) -> list[Part]:
        """The template's text and empty places for contents. The same for all chats with these roles."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            pieces = _MARKS.split(self._marked(messages))
            parts = [Part("", int(piece)) if index % 2 else Part(piece, None) for index, piece in enumerate(pieces)]
            self._skeletons[roles] = [part for part in parts if part.text or part.message is not None]
        return self._skeletons[roles]

    def _written(self, skeleton: Sequence[Part], messages: Sequence[Message], index: int) -> str:
        """What the template makes of one message's content. Raises ChatError where that cannot be told."""
        places = [place for place, part in enumerate(skeleton) if part.message == index]
        if len(places) != 1:
            return messages[index]["content"]  # dropped or repeated: as it is, or the rendering will differ
        marked = [_MARK.format(part.message) if part.message is not None else part.text for part in skeleton]
        before, after = "".join(marked[: places[0]]), "".join(marked[places[0] + 1 :])
        text = self._marked(messages, but=index)
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
            raise ChatError("the chat template's own text depends on what the messages say")
        return text[len(before) : len(text) - len(after)]


def _fill(skeleton: Sequence[Part], contents: Sequence[str]) -> list[Part]:
    return [part if part.message is None else Part(contents[part.message], part.message) for part in skeleton]


def _faults(messages: Sequence[Message], parts: Sequence[Part]) -> dict[int, ChatError]:
    """What the assistant says that does not stand in the rendering once, unchanged and in order: why, by the message's
    number.
    """
    wanted = [index for index, m in enumerate(messages) if m["role"] == ASSISTANT and m["content"]]
    order = [part.message for part in parts if part.message in wanted]
    faults = {}
    for index in wanted:
        if index not in order:
            faults[index] = ChatError("the chat template leaves out what the assistant says")
    for index in wanted:
        if order.count(index) > 1:
            faults[index] = ChatError("the chat template repeats what the assistant says")
    once = [index for index in order if index not in faults]
    if once != [index for index in wanted if index not in faults]:
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
