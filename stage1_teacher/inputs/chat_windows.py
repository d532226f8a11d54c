"""Chats as what becomes one record each: the conversation as context, each turn of the assistant covered by itself.

A chat longer than the teacher's context is cut between messages into windows, each a conversation of its own that
starts with the user: its first turns are context, the others are supervised, so that each turn is supervised once. What
comes before is not in a later window, nor is a system's message, as of a long text a later window sees only the
overlap.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.tokenization.chat_template import ChatError, Message
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat, Turn, document_of
from schemas.record import Segment
from stage1_teacher.inputs.encoded_windows import CoveredSpan, EncodedWindow
from stage1_teacher.inputs.windows import Window


class _Part(NamedTuple):
    """Messages `first .. last` of a chat, rendered by themselves; they hold the chat's turns up to `done`."""

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
) -> list[EncodedWindow]:
    """A chat's windows. Raises ChatError or SpellingError, with the reason, where it is left out.

    Args:
        ends: tokens that mean END; a turn that another token follows has none.
        overlap: tokens of context that a later window repeats, about, and as far as they fit.
    """
    whole = chat.encode(messages)
    if num_prompt(whole) <= max_tokens:
        return [chat_window(doc_id, _roles(messages), whole, ends)]
    windows: list[EncodedWindow] = []
    done = 0
    while done < len(whole.turns):
        part = _next_part(messages, whole.turns, done, chat, max_tokens, overlap)
        bounds = ChatBounds(
            start=len(document_of(messages[: part.first])),
            is_last=part.done == len(whole.turns),
            first_supervised=whole.turns[done].message - part.first,
        )
        windows.append(chat_window(doc_id, _roles(messages[part.first : part.last]), part.encoded, ends, bounds))
        done = part.done
    return windows


class ChatBounds(NamedTuple):
    """Messages as a window of a chat.

    Attributes:
        start: byte offset of the first one in the chat.
        is_last: they are the chat's end.
        first_supervised: the message of the window from which on turns are supervised.
    """

    start: int = 0
    is_last: bool = True
    first_supervised: int = 0


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
        roles: who says each of its messages.
        ends: tokens that mean END.
        conversation: JSON, where there is more than contents; its last messages are these.
    """
    text, start = b"".join(encoded.contents), bounds.start
    turns = [turn for turn in encoded.turns if turn.message >= bounds.first_supervised]
    return EncodedWindow(
        doc_id=doc_id,
        bounds=Window(start, start + len(text), start + turns[0].start, bounds.is_last),
        text=text,
        tokens=encoded.tokens[1 : num_prompt(encoded)],
        spans=tuple(_span(turn, encoded, text, ends) for turn in turns),
        start=encoded.tokens[0],
        roles=tuple(roles),
        lengths=tuple(map(len, encoded.contents)),
        conversation=conversation,
    )


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def num_prompt(encoded: EncodedChat) -> int:
    """Tokens that the teacher reads: the last row is the one after the assistant's last word."""
    return encoded.turns[-1].last


def _span(turn: Turn, encoded: EncodedChat, text: bytes, ends: Sequence[int]) -> CoveredSpan:
    return CoveredSpan(
        first=turn.first - 1,  # the chat's first token is the window's start
        tokens=encoded.tokens[turn.first : turn.last],
        covered_bytes=turn.prefix + text[turn.start : turn.end],
        start=turn.start,
        segment=Segment(turn.start, turn.end - turn.start, turn.end_token in ends),
    )


def _next_part(
    messages: Sequence[Message], turns: Sequence[Turn], done: int, chat: ChatTokenizer, max_tokens: int, overlap: int
) -> _Part:
    """The window that supervises turns from number `done` on. Raises ChatError where none holds even one."""
    for first in _starts(messages, turns, done, overlap):
        before = _tokens_before(turns, first)
        fitting = [number for number in range(done + 1, len(turns)) if turns[number].last - before <= max_tokens]
        for last in reversed([done, *fitting]):  # rendered by themselves they may need more tokens, or fewer
            part = messages[first : turns[last].message + 1]
            encoded = chat.encode(part)
            if num_prompt(encoded) <= max_tokens:
                return _Part(first, first + len(part), last + 1, encoded)
    raise ChatError("a turn and what it answers are longer than teacher.max_tokens")


def _starts(messages: Sequence[Message], turns: Sequence[Turn], done: int, overlap: int) -> Iterator[int]:
    """Messages with which a window may start, the best first: with as little context as is wanted, else with as much as
    fits.
    """
    if not done:
        yield 0
        return
    asked = [i for i, m in enumerate(messages[: turns[done].message]) if m["role"] == "user"]
    enough = [first for first in asked if turns[done].first - _tokens_before(turns, first) >= overlap]
    yield from enough[-1:]
    yield from asked[len(enough) :]


def _tokens_before(turns: Sequence[Turn], message: int) -> int:
    """Tokens before a message in the whole chat, about: those up to the end of the last turn before it."""
    return max((turn.last for turn in turns if turn.message < message), default=0)
