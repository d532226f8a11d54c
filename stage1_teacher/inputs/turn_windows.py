"""Windows of chats with reasoning or tool calls: as many as the template needs to show each turn as the model saw it.

A record holds the messages since the previous record and supervises all their turns; earlier messages are in its
conversation, as context. If that is too long for the teacher, the conversation starts later, with the user; the
system's message and the tools stay.
"""

from collections.abc import Iterator, Sequence

from pipeline.tokenization.chat_template import ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from pipeline.tokenization.conversation import Conversation, Excerpt
from stage1_teacher.inputs.chat_windows import WHOLE_CHAT, ChatBounds, Learned, chat_window, num_prompt
from stage1_teacher.inputs.encoded_windows import EncodedWindow


def cut_conversation(
    doc_id: str,
    conversation: Conversation,
    chat: ChatTokenizer,
    ends: Sequence[int],
    max_tokens: int,
    overlap: int = 0,
    learned: Learned | None = None,
) -> list[EncodedWindow]:
    """Cut a conversation into windows. Raises ChatError or SpellingError, with the reason, if it must be left out.

    Takes the arguments of `cut_chat`.
    """
    parts = [part for excerpt in chat.excerpts(conversation) for part in _fitting(excerpt, chat, max_tokens, overlap)]
    windows: list[EncodedWindow] = []
    start = num_messages = 0
    for number, (excerpt, encoded) in enumerate(parts, start=1):
        later = learned and learned.after(num_messages)
        bounds = ChatBounds(start, is_last=number == len(parts), learned=later)
        windows.append(conversation_window(doc_id, excerpt, encoded, ends, bounds))
        num_messages += excerpt.num_messages
        start += len(windows[-1].text)
    return windows


def conversation_window(
    doc_id: str, excerpt: Excerpt, encoded: EncodedChat, ends: Sequence[int], bounds: ChatBounds = WHOLE_CHAT
) -> EncodedWindow:
    """Make a conversation's last messages into one window."""
    roles = [message["role"] for message in excerpt.messages]
    return chat_window(doc_id, roles, encoded, ends, bounds, excerpt.conversation.to_json())


def _fitting(
    excerpt: Excerpt, chat: ChatTokenizer, max_tokens: int, overlap: int
) -> Iterator[tuple[Excerpt, EncodedChat]]:
    """Yield the excerpt, or several that fit, with fewer turns or less context. Raises ChatError if a turn does not."""
    encoded = chat.encode(excerpt)
    if num_prompt(encoded) <= max_tokens:
        yield excerpt, encoded
        return
    whole = excerpt.conversation
    done = len(whole.messages) - excerpt.num_messages
    turns = [index for index in whole.turns if index >= done]
    while turns:
        first = _first(whole, done, turns[0], chat, max_tokens, overlap)
        for index in reversed(turns):
            part = Excerpt(whole.window(first, index + 1), index + 1 - done)
            encoded = chat.encode(part)
            if num_prompt(encoded) <= max_tokens:
                break
        yield part, encoded
        turns = [later for later in turns if later > index]
        done = index + 1


def _first(whole: Conversation, done: int, turn: int, chat: ChatTokenizer, max_tokens: int, overlap: int) -> int:
    """Return the index of the message with which the context of a turn starts.

    That is the first of all, if it fits, or else one of the user's, so that there are about `overlap` tokens of
    context, or as many as fit. Raises ChatError if none fits.
    """

    def encoded(first: int) -> EncodedChat:
        return chat.encode(Excerpt(whole.window(first, turn + 1), turn + 1 - done))

    if num_prompt(encoded(0)) <= max_tokens:
        return 0
    start = None
    for first in reversed([i for i, m in enumerate(whole.messages[: done + 1]) if m["role"] == "user" and i]):
        tried = encoded(first)
        if num_prompt(tried) > max_tokens:
            break
        start = first
        if tried.turns[0].first >= overlap:
            break
    if start is None:
        raise ChatError("a turn and what it answers are longer than teacher.max_tokens")
    return start
