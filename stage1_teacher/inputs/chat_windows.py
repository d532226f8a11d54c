"""Windows of chats: the conversation is context, and each turn of the assistant is a covered span.

A chat longer than the teacher's context is cut between messages into windows, each a conversation of its own that
starts with the user: its first turns are context and the others are supervised, so that each turn is supervised once.
Earlier messages are not in a later window, nor is the system's message, just as a later window of a long text sees only
the overlap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pipeline.tokenization.chat_template import ChatError, Message
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat, Turn, document_of
from schemas.record import Segment
from stage1_teacher.inputs.encoded_windows import CoveredSpan, EncodedWindow
from stage1_teacher.inputs.windows import Window


class _Part(NamedTuple):
    """Messages `first .. last` of a chat, rendered by themselves. They include the chat's turns up to `done`."""

    first: int
    last: int
    done: int
    encoded: EncodedChat


def cut_chat(
    doc_id: str,
    messages: Sequence[Message],
    chat: ChatTokenizer,
    ends: Sequence[int],
    max_tokens: int,
    overlap: int = 0,
    learned: "Learned | None" = None,
) -> list[EncodedWindow]:
    """Cut a chat into windows. Raises ChatError or SpellingError, with the reason, if it must be left out.

    Args:
        ends: tokens that mean END; a turn followed by another token has none.
        overlap: approximate number of context tokens that a later window repeats, as far as they fit.
        learned: the supervised turns; None: all.
    """
    whole = chat.encode(messages)
    if num_prompt(whole) <= max_tokens:
        return [chat_window(doc_id, _roles(messages), whole, ends, ChatBounds(learned=learned))]
    windows: list[EncodedWindow] = []
    done = 0
    while done < len(whole.turns):
        part = _next_part(messages, whole.turns, done, chat, max_tokens, overlap)
        bounds = ChatBounds(
            start=len(document_of(messages[: part.first])),
            is_last=part.done == len(whole.turns),
            first_supervised=whole.turns[done].message - part.first,
            learned=learned and learned.after(part.first),
        )
        windows.append(chat_window(doc_id, _roles(messages[part.first : part.last]), part.encoded, ends, bounds))
        done = part.done
    return windows


class Learned(NamedTuple):
    """The supervised turns of a chat, where they are not all.

    Attributes:
        messages: their numbers.
        has_end: False: the last of them was cut off, and no END follows it.
    """

    messages: frozenset[int]
    has_end: bool

    def after(self, num_messages: int) -> "Learned":
        """Return the same, numbered in a window that begins behind so many messages."""
        return self._replace(messages=frozenset(number - num_messages for number in self.messages))

    def of(self, span: CoveredSpan, turn: Turn, turns: Sequence[Turn]) -> CoveredSpan:
        """Return the span of a turn without END, if its message was cut off there."""
        is_last = turn is [other for other in turns if other.message == turn.message][-1]
        if self.has_end or not is_last or turn.message != max(self.messages):
            return span
        return replace(span, segments=tuple(replace(segment, has_end=False) for segment in span.segments))


class ChatBounds(NamedTuple):
    """Position of a window's messages in their chat.

    Attributes:
        start: byte offset of the first message in the chat.
        is_last: the window ends the chat.
        first_supervised: index in the window of the first message whose turn may be supervised.
        learned: the supervised turns among the window's messages; None: all. Without any, the window has no span.
    """

    start: int = 0
    is_last: bool = True
    first_supervised: int = 0
    learned: Learned | None = None


WHOLE_CHAT = ChatBounds()


def chat_window(
    doc_id: str,
    roles: Sequence[str],
    encoded: EncodedChat,
    ends: Sequence[int],
    bounds: ChatBounds = WHOLE_CHAT,
    conversation: str = "",
) -> EncodedWindow:
    """Make a conversation into one window.

    Args:
        roles: the role of each message.
        ends: tokens that mean END.
        conversation: JSON, if there is more than contents; it ends with these messages.
    """
    text, start = b"".join(encoded.contents), bounds.start
    turns = [turn for turn in encoded.turns if turn.message >= bounds.first_supervised]
    spans = [_span(turn, encoded, text, ends) for turn in turns]
    if (learned := bounds.learned) is not None:
        spans = [
            learned.of(span, turn, turns)
            for span, turn in zip(spans, turns, strict=True)
            if turn.message in learned.messages
        ]
    return EncodedWindow(
        doc_id=doc_id,
        bounds=Window(start, start + len(text), start + turns[0].start, bounds.is_last),
        text=text,
        tokens=encoded.tokens[1 : num_prompt(encoded)],
        spans=tuple(spans),
        start=encoded.tokens[0],
        roles=tuple(roles),
        lengths=tuple(map(len, encoded.contents)),
        conversation=conversation,
    )


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def num_prompt(encoded: EncodedChat) -> int:
    """Count the tokens that the teacher reads; the last row is the one after the assistant's last word."""
    return encoded.turns[-1].last


def _span(turn: Turn, encoded: EncodedChat, text: bytes, ends: Sequence[int]) -> CoveredSpan:
    return CoveredSpan(
        first=turn.first - 1,  # the chat's first token is the window's start
        tokens=encoded.tokens[turn.first : turn.last],
        covered_bytes=turn.prefix + text[turn.start : turn.end],
        start=turn.start,
        segments=(Segment(turn.start, turn.end - turn.start, turn.end_token in ends),),
        num_prefix=len(turn.prefix),
    )


def _next_part(
    messages: Sequence[Message], turns: Sequence[Turn], done: int, chat: ChatTokenizer, max_tokens: int, overlap: int
) -> _Part:
    """Return the window that supervises turns from number `done` on. Raises ChatError if not even one turn fits."""
    for first in _starts(messages, turns, done, overlap):
        before = _tokens_before(turns, first)
        fitting = [number for number in range(done + 1, len(turns)) if turns[number].last - before <= max_tokens]
        for last in reversed([done, *fitting]):  # rendered by themselves, the messages may need more or fewer tokens
            part = messages[first : turns[last].message + 1]
            encoded = chat.encode(part)
            if num_prompt(encoded) <= max_tokens:
                return _Part(first, first + len(part), last + 1, encoded)
    raise ChatError("a turn and what it answers are longer than teacher.max_tokens")


def _starts(messages: Sequence[Message], turns: Sequence[Turn], done: int, overlap: int) -> Iterator[int]:
    """Yield the messages that a window may start with, best first.

    The best start gives the least context that is at least `overlap`; the others give less and less.
    """
    if not done:
        yield 0
        return
    user_messages = [i for i, m in enumerate(messages[: turns[done].message]) if m["role"] == "user"]
    enough = [first for first in user_messages if turns[done].first - _tokens_before(turns, first) >= overlap]
    yield from enough[-1:]
    yield from user_messages[len(enough) :]


def _tokens_before(turns: Sequence[Turn], message: int) -> int:
    """Estimate the tokens before a message in the whole chat: those up to the end of the last turn before it."""
    return max((turn.last for turn in turns if turn.message < message), default=0)
