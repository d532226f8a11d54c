"""Chats of a dump as another model's template writes them: turn by turn, wherever it writes the stored bytes.

Targets of an assistant's turn belong to its bytes. A template may write a turn with different bytes than the teacher's
did, or may change it once the chat continues. Some turns of a record are therefore usable and others not, and some need
a separate rendering. The text around a turn is always the template's own.
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
from schemas.record import Record, RecordText


@dataclass(frozen=True)
class StoredChat:
    """A chat of a dump in a model's tokens, as far as its template writes the stored turns.

    Attributes:
        renderings: at least one; together they hold each turn once, with byte offsets of the record.
        left_out: the fault of each of the record's supervised messages whose turn is in no rendering.
    """

    renderings: tuple[EncodedChat, ...]
    left_out: Mapping[int, ValueError]

    @property
    def is_whole(self) -> bool:
        """Return whether one rendering holds all turns."""
        return len(self.renderings) == 1 and not self.left_out


def encode_whole(chat: ChatTokenizer, records: Sequence[RecordText | Record]) -> list[EncodedChat | ValueError]:
    """Encode each record's chat in one rendering.

    In its place, a ChatError if the template writes any turn differently, or a SpellingError.
    """
    encodings = chat.encode_batch([chat_of(record) for record in records])
    return [
        ChatError(OTHERWISE) if isinstance(encoded, EncodedChat) and not _is_stored(encoded, record) else encoded
        for encoded, record in zip(encodings, records, strict=True)
    ]


def encode_by_turn(chat: ChatTokenizer, records: Sequence[RecordText | Record]) -> list[StoredChat | ValueError]:
    """Encode each record's chat, turn by turn unless one rendering holds it all.

    In its place, the reason if none of its turns can be used.
    """
    return [
        _by_turn(chat, record, encoded) if isinstance(encoded, ChatError) else _whole(encoded)
        for record, encoded in zip(records, encode_whole(chat, records), strict=True)
    ]


def messages_of_segments(record: RecordText | Record) -> list[int]:
    """Return the number of each segment's message; a segment of END alone lies at its message's end."""
    ends = list(accumulate(record.message_lengths))
    return [bisect_right(ends, max(segment.start - (not segment.length), 0)) for segment in record.segments]


def _is_stored(encoded: EncodedChat, record: RecordText | Record) -> bool:
    lengths = tuple(map(len, encoded.contents))
    return lengths == tuple(record.message_lengths) and b"".join(encoded.contents) == record.document


def _whole(encoded: EncodedChat | ValueError) -> StoredChat | ValueError:
    return StoredChat((encoded,), {}) if isinstance(encoded, EncodedChat) else encoded


def _by_turn(chat: ChatTokenizer, record: RecordText | Record, fault: ChatError) -> StoredChat | ValueError:
    """Encode a record turn by turn; return `fault`, the reason why it is not whole, if nothing can be used."""
    supervised = list(dict.fromkeys(messages_of_segments(record)))
    for written, faults in _ways(chat, record, supervised):
        renderings = []
        left_out: dict[int, ValueError] = {number: error for number, error in faults.items() if number in supervised}
        for rendering, encoded in zip(written, chat.encode_written(written), strict=True):
            if isinstance(encoded, EncodedChat):
                renderings.append(encoded)
            else:
                left_out |= {number: encoded for number in supervised if number in rendering.spoken}
        if any(turn.message in supervised for encoded in renderings for turn in encoded.turns):
            return StoredChat(tuple(renderings), dict(sorted(left_out.items())))
    return fault


def _ways(
    chat: ChatTokenizer, record: RecordText | Record, supervised: Sequence[int]
) -> Iterator[tuple[list[Written], dict[int, ChatError]]]:
    """Yield ways to render a record, the best first."""
    messages = chat_of(record)
    if isinstance(messages, Excerpt):
        yield chat.turn_template.write_agreeing(messages, _stored(record), supervised)
        return
    contents = [message["content"] for message in messages if message["role"] == ASSISTANT]
    if chat.turn_template.forms.reasoning is not None and any(map(split_reasoning, contents)):
        # To the teacher the reasoning in a content was text; this template moves it out and writes it as reasoning.
        excerpt = Excerpt(Conversation(tuple(messages)), len(messages))
        yield chat.turn_template.write_agreeing(excerpt, _stored(record), supervised)
    try:
        parts, faults = chat.template.render_any(messages)
    except ChatError:
        return
    spoken = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i not in faults]
    yield [chat.split(parts, messages, spoken)], faults


def _stored(record: RecordText | Record) -> list[bytes]:
    """Return the bytes of each message."""
    return [record.document[start:end] for start, end in pairwise([0, *accumulate(record.message_lengths)])]
