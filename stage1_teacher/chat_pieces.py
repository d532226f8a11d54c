"""Chats as what becomes one record each: the whole conversation as context, each turn of the assistant covered by itself."""

from collections.abc import Sequence

from pipeline.chat import ChatTokenizer, EncodedChat, Turn, document_of
from pipeline.chat_template import ChatError, Message
from schemas.shard import Segment
from stage1_teacher.pieces import Piece, Stretch
from stage1_teacher.windows import Window


def cut_chat(
    doc_id: str, messages: Sequence[Message], chat: ChatTokenizer, ends: Sequence[int], max_tokens: int
) -> list[Piece]:
    """A chat's pieces. Raises ChatError or SpellingError, with the reason, where it is left out.

    Args:
        ends: tokens that mean END; a turn that another token follows has none.
    """
    encoded = chat.encode(messages)
    text = document_of(messages)
    stretches = tuple(_stretch(turn, encoded, text, ends) for turn in encoded.turns)
    tokens = encoded.tokens[1 : encoded.turns[-1].last]  # the last row is the one after the assistant's last word
    if len(tokens) + 1 > max_tokens:
        raise ChatError("longer than teacher.max_tokens")
    return [
        Piece(
            doc_id=doc_id,
            window=Window(0, len(text), 0, True),
            text=text,
            tokens=tokens,
            stretches=stretches,
            start=encoded.tokens[0],
            roles=tuple(message["role"] for message in messages),
            lengths=tuple(len(message["content"].encode()) for message in messages),
        )
    ]


def _stretch(turn: Turn, encoded: EncodedChat, text: bytes, ends: Sequence[int]) -> Stretch:
    return Stretch(
        first=turn.first - 1,  # the chat's first token is the piece's start
        tokens=encoded.tokens[turn.first : turn.last],
        spelled=turn.prefix + text[turn.start : turn.end],
        start=turn.start,
        segment=Segment(turn.start, turn.end - turn.start, turn.end_token in ends),
    )
