"""Chats of a dump as another model's template writes them: turn by turn, wherever it writes the bytes that are stored.

What is asked about a turn of the assistant is asked of its bytes. A template may write one turn with other bytes than
the teacher's did, or only when it comes and no longer once the chat goes on: so of a record some turns can be used and
others not, and some in a rendering of their own. What stands around a turn is always the template's own.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pipeline.tokenization.assistant_turns import OTHERWISE
from pipeline.tokenization.chat_renderings import Written
from pipeline.tokenization.chat_template import ASSISTANT, ChatError
from pipeline.tokenization.chat_tokenizer import ChatTokenizer, EncodedChat
from pipeline.tokenization.conversation import Conversation, Excerpt, chat_of, split_reasoning
from schemas.record import Question, Record


@dataclass(frozen=True)
class StoredChat:
    """A chat of a dump in a model's tokens, as far as its template writes the turns that are stored.

    Attributes:
        renderings: at least one; together they hold each turn once, with byte offsets of the record.
        left_out: of the messages that the record asks about those whose turns are in none, and why.
    """

    renderings: tuple[EncodedChat, ...]
    left_out: Mapping[int, ValueError]

    @property
    def is_whole(self) -> bool:
        """Whether it is one rendering that holds all turns."""
        return len(self.renderings) == 1 and not self.left_out


def encode_whole(chat: ChatTokenizer, asked: Sequence[Question | Record]) -> list[EncodedChat | ValueError]:
    """Each record's chat in one rendering, or ChatError where the template writes any turn otherwise, or
    SpellingError.
    """
    encodings = chat.encode_batch([chat_of(record) for record in asked])
    return [
        ChatError(OTHERWISE) if isinstance(encoded, EncodedChat) and not _is_stored(encoded, record) else encoded
        for encoded, record in zip(encodings, asked, strict=True)
    ]


def encode_by_turn(chat: ChatTokenizer, asked: Sequence[Question | Record]) -> list[StoredChat | ValueError]:
    """Each record's chat, turn by turn where it is not whole in one rendering; or why none of its turns can be used."""
    return [
        _by_turn(chat, record, found) if isinstance(found, ChatError) else _whole(found)
        for record, found in zip(asked, encode_whole(chat, asked), strict=True)
    ]


def messages_of_segments(asked: Question | Record) -> list[int]:
    """The number of the message in which each segment lies; an END alone stands at its message's end."""
    ends = list(accumulate(asked.message_lengths))
    return [bisect_right(ends, max(segment.start - (not segment.length), 0)) for segment in asked.segments]


def _is_stored(encoded: EncodedChat, record: Question | Record) -> bool:
    lengths = tuple(map(len, encoded.contents))
    return lengths == tuple(record.message_lengths) and b"".join(encoded.contents) == record.document


def _whole(found: EncodedChat | ValueError) -> StoredChat | ValueError:
    return StoredChat((found,), {}) if isinstance(found, EncodedChat) else found


def _by_turn(chat: ChatTokenizer, record: Question | Record, fault: ChatError) -> StoredChat | ValueError:
    """`fault`: why it is not whole; of a record of which nothing can be used, why."""
    wanted = list(dict.fromkeys(messages_of_segments(record)))
    for written, faults in _ways(chat, record, wanted):
        renderings = []
        left_out: dict[int, ValueError] = {number: error for number, error in faults.items() if number in wanted}
        for rendering, encoded in zip(written, chat.encode_written(written), strict=True):
            if isinstance(encoded, EncodedChat):
                renderings.append(encoded)
            else:
                left_out |= {number: encoded for number in wanted if number in rendering.spoken}
        if any(turn.message in wanted for encoded in renderings for turn in encoded.turns):
            return StoredChat(tuple(renderings), dict(sorted(left_out.items())))
    return fault


def _ways(
    chat: ChatTokenizer, record: Question | Record, wanted: Sequence[int]
) -> Iterator[tuple[list[Written], dict[int, ChatError]]]:
    """What may be written of a record, the best first."""
    found = chat_of(record)
    if isinstance(found, Excerpt):
        yield chat.turn_template.write_agreeing(found, _stored(record), wanted)
        return
    said = [message["content"] for message in found if message["role"] == ASSISTANT]
    if chat.turn_template.forms.reasoning is not None and any(map(split_reasoning, said)):
        # To the teacher the reasoning in a content was text; this template takes it out, and writes it as a turn's.
        excerpt = Excerpt(Conversation(tuple(found)), len(found))
        yield chat.turn_template.write_agreeing(excerpt, _stored(record), wanted)
    try:
        parts, faults = chat.template.render_any(found)
    except ChatError:
        return
    spoken = [i for i, message in enumerate(found) if message["role"] == ASSISTANT and i not in faults]
    yield [chat.split(parts, found, spoken)], faults


def _stored(record: Question | Record) -> list[bytes]:
    """The bytes of each message."""
    return [record.document[start:end] for start, end in pairwise([0, *accumulate(record.message_lengths)])]
