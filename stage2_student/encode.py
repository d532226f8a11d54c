"""Records in the student's tokens: how many, and which bytes each of them covers. Nothing is ever cut."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np

from pipeline.chat import ChatTokenizer, EncodedChat
from pipeline.chat_template import ChatError
from schemas.record import Question, Record
from stage2_student.batches import Encoded
from stage2_student.spans import token_spans

TOO_LONG = "longer than train.max_tokens"


class Tokenizer(Protocol):
    """What is needed of `pipeline.tokenizer_bytes.ByteTokenizer`."""

    @property
    def token_bytes(self) -> tuple[bytes | None, ...]: ...
    @property
    def prefix(self) -> bytes: ...
    @property
    def sha256(self) -> str: ...
    def encode_batch(self, documents: Sequence[bytes]) -> Sequence[list[int] | ValueError]: ...


def count_tokens(
    asked: Sequence[Question | Record], tokenizer: Tokenizer, chat: ChatTokenizer | None = None
) -> list[int | str]:
    """Of each record the student's tokens, its start token included, or the reason why it cannot be used. Errors as `encode_records`."""
    return [found if isinstance(found, str) else _num_tokens(found) for found in _tokens(asked, tokenizer, chat)]


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, max_tokens: int, chat: ChatTokenizer | None = None
) -> list[Encoded | str]:
    """Each record in the student's tokens, or the reason why it is left out.

    Args:
        chat: the tokenizer with its chat template. ValueError where it is None and there is a chat among the records.
    """
    encoded: list[Encoded | str] = []
    for record, found in zip(records, _tokens(records, tokenizer, chat), strict=True):
        if isinstance(found, str):
            encoded.append(found)
        elif _num_tokens(found) > max_tokens:
            encoded.append(TOO_LONG)
        elif isinstance(found, EncodedChat):
            encoded.append(encoded_chat(record, found, tokenizer))
        else:
            encoded.append(_encoded(record, found, tokenizer))
    return encoded


def _num_tokens(found: list[int] | EncodedChat) -> int:
    """With the start token; that of a chat is one of its own."""
    return len(found.tokens) if isinstance(found, EncodedChat) else len(found) + 1


def _tokens(
    asked: Sequence[Question | Record], tokenizer: Tokenizer, chat: ChatTokenizer | None
) -> list[list[int] | EncodedChat | str]:
    plain = [record for record in asked if not record.message_roles]
    ids_of_plain = iter(tokenizer.encode_batch([record.document for record in plain]))
    chats = [record for record in asked if record.message_roles]
    if chats and chat is None:
        raise ValueError(
            f"the dump holds chats (document {chats[0].doc_id!r}), and the student has no chat template; give student.chat_template"
        )
    of_chats = iter(chat.encode_stored_batch(chats) if chat is not None else [])
    return [_or_reason(next(of_chats) if record.message_roles else next(ids_of_plain)) for record in asked]


def _or_reason(found: list[int] | EncodedChat | ValueError) -> list[int] | EncodedChat | str:
    if isinstance(found, ChatError):
        return found.reason
    return "the student's tokenizer cannot spell it" if isinstance(found, ValueError) else found


def encoded_chat(record: Record, chat: EncodedChat, tokenizer: Tokenizer) -> Encoded:
    """A chat's tokens and the bytes they cover; its first token is the start. Tokens outside turns stand empty: what ends a turn at
    its end, others where the next turn starts."""
    starts = np.full(len(chat.tokens), chat.turns[0].start, dtype=np.int64)
    ends = starts.copy()
    for turn, after in zip_longest(chat.turns, chat.turns[1:]):
        sizes = [len(tokenizer.token_bytes[token] or b"") for token in chat.tokens[turn.first : turn.last]]
        edges = np.maximum(turn.start - len(turn.prefix) + np.cumsum([0, *sizes]), turn.start)
        starts[turn.first : turn.last], ends[turn.first : turn.last] = edges[:-1], edges[1:]
        starts[turn.last : turn.last + 1] = ends[turn.last : turn.last + 1] = turn.end
        if after is not None:
            starts[turn.last + 1 :] = ends[turn.last + 1 :] = after.start
    turn_ends = {turn.end: turn.last - 1 for turn in chat.turns if turn.end_token is not None}
    return Encoded(
        record,
        np.array(chat.tokens[1:], dtype=np.int64),
        starts[1:],
        ends[1:],
        start=chat.tokens[0],
        turn_ends=turn_ends,
    )


def _encoded(record: Record, ids: Sequence[int], tokenizer: Tokenizer) -> Encoded:
    spans = token_spans([tokenizer.token_bytes[i] or b"" for i in ids], record.document, tokenizer.prefix)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    ends = np.array([span.stop for span in spans], dtype=np.int64)
    return Encoded(record, np.array(ids, dtype=np.int64), starts, ends)
