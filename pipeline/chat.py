"""A conversation as a model is given it: tokens, and where in them lies what the assistant says.

Control tokens are parsed in the template's own text alone: a message that spells one is text. Between two control tokens, template
and contents are one stretch of text, encoded together as the model would see them. So a token may hold bytes of both; what it
holds of the assistant's words is context then, and not supervised.

The bytes of a chat are the contents of all its messages, joined in order; no template has a part in them. Offsets count in them.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from pipeline.chat_template import ASSISTANT, ChatError, ChatTemplate, Message, Part
from pipeline.loading import load_tokenizer
from pipeline.tokenizer_bytes import ByteTokenizer

_PROBE = [{"role": "user", "content": "Is it there?"}, {"role": ASSISTANT, "content": "Yes, it is there."}]


@dataclass(frozen=True)
class Turn:
    """What the assistant says in one message, as far as whole tokens hold it and nothing else.

    Attributes:
        message: its number.
        start, end: bytes of the chat that the tokens hold.
        first, last: tokens `first .. last` of the chat hold them.
        prefix: what the tokenizer put before the first of these tokens; part of what they spell.
        end_token: the control token that comes next; None where the last token reaches into the template, or text follows.
    """

    message: int
    start: int
    end: int
    first: int
    last: int
    prefix: bytes
    end_token: int | None


@dataclass(frozen=True)
class EncodedChat:
    """A chat's tokens, from the template's first to the end of the assistant's last turn; never empty, and nor is `turns`."""

    tokens: list[int]
    turns: tuple[Turn, ...]


class _Stretch(NamedTuple):
    """Text between two control tokens."""

    prefix: bytes
    parts: list[Part]

    @property
    def text(self) -> bytes:
        return "".join(part.text for part in self.parts).encode()


_Layout = list[int | _Stretch]  # control tokens by id, and what stands between them


def document_of(messages: Sequence[Message]) -> bytes:
    """The bytes of a chat."""
    return "".join(message["content"] for message in messages).encode()


class ChatTokenizer:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: ByteTokenizer, wrapped: Any) -> None:
        """`wrapped` is the transformers tokenizer that `tokenizer` was made of. Raises ValueError where it has no template."""
        self.tokenizer = tokenizer
        self.template = ChatTemplate(wrapped)
        added = [(index, token) for index, token in wrapped.added_tokens_decoder.items() if token.special]
        self._ids = {token.content: index for index, token in added}
        # Some control tokens take the blanks beside them along.
        names = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for _, token in sorted(added, key=lambda item: -len(item[1].content))
        ]
        self._control = re.compile(f"({'|'.join(names)})") if names else None

    @classmethod
    def load(
        cls, folder_or_hub_id: str, trust_remote_code: bool = False, revision: str | None = None
    ) -> "ChatTokenizer":
        """From what AutoTokenizer loads. Raises ValueError for a tokenizer without template, or one that cannot spell bytes."""
        wrapped = load_tokenizer(folder_or_hub_id, trust_remote_code, revision)
        if wrapped.chat_template is None:
            raise ValueError(f"{folder_or_hub_id}: its tokenizer has no chat template, so that no chat can be rendered")
        return cls(ByteTokenizer.from_wrapped(wrapped, folder_or_hub_id), wrapped)

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """A chat's tokens and turns. Raises ChatError or SpellingError, each with its reason."""
        [encoded] = self.encode_batch([messages])
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded

    def encode_batch(self, chats: Sequence[Sequence[Message]]) -> list[EncodedChat | ValueError]:
        """Like `encode`, for many chats at once; what is wrong with one is returned in its place."""
        layouts = [self._layout(messages) for messages in chats]
        stretches = [s for layout in layouts if isinstance(layout, list) for s in layout if isinstance(s, _Stretch)]
        encodings = iter(self.tokenizer.encode_batch([s.text for s in stretches], [s.prefix for s in stretches]))
        return [
            layout if isinstance(layout, ValueError) else self._encoded(messages, layout, encodings)
            for messages, layout in zip(chats, layouts, strict=True)
        ]

    def end_of_turn(self) -> int | None:
        """The control token that the template puts after what the assistant says; None where it puts none."""
        try:
            return self.encode(_PROBE).turns[-1].end_token
        except ChatError as error:
            raise ValueError(f"the chat template cannot write a question and its answer: {error}") from error

    def _layout(self, messages: Sequence[Message]) -> _Layout | ChatError:
        try:
            parts = self.template.render(messages)
        except ChatError as error:
            return error
        layout: _Layout = []
        for item in self._split(parts):
            if isinstance(item, int):
                layout.append(item)
            elif layout and isinstance(layout[-1], _Stretch):
                layout[-1].parts.append(item)
            else:
                layout.append(_Stretch(b"", [item]))
        return [
            item
            if isinstance(item, int)
            else item._replace(prefix=self.tokenizer.prefix_of(item.text, first=not index))
            for index, item in enumerate(layout)
        ]

    def _split(self, parts: Sequence[Part]) -> Iterator[int | Part]:
        """Control tokens that the template writes, and the text around them."""
        for part in parts:
            if part.message is not None or self._control is None:
                if part.text:
                    yield part
                continue
            for index, piece in enumerate(self._control.split(part.text)):
                if index % 2:
                    yield self._ids[piece] if piece in self._ids else self._ids[piece.strip()]
                elif piece:
                    yield Part(piece, None)

    def _encoded(
        self, messages: Sequence[Message], layout: _Layout, encodings: Iterator[list[int] | ValueError]
    ) -> EncodedChat | ValueError:
        sizes = [len(message["content"].encode()) for message in messages]
        message_starts = [0, *accumulate(sizes)]
        spoken = {index for index, message in enumerate(messages) if message["role"] == ASSISTANT}
        tokens: list[int] = []
        turns: list[Turn] = []
        fault: ValueError | None = None
        for index, item in enumerate(layout):
            if isinstance(item, int):
                tokens.append(item)
                continue
            ids = next(encodings)
            if isinstance(ids, ValueError):
                fault = fault or ids
                continue
            follows = next(iter(layout[index + 1 : index + 2]), None)  # a control token, where anything does
            assert not isinstance(follows, _Stretch)
            turns += self._turns(item, ids, len(tokens), follows, message_starts, spoken)
            tokens += ids
        if fault is not None:
            return fault
        if not turns:
            return ChatError("no token holds only what the assistant says")
        if not turns[0].first:
            return ChatError("the chat template writes nothing before what the assistant says")
        last = turns[-1].last + (turns[-1].end_token is not None)
        return EncodedChat(tokens[:last], tuple(turns))

    def _turns(
        self,
        stretch: _Stretch,
        ids: Sequence[int],
        first_token: int,
        follows: int | None,
        message_starts: Sequence[int],
        spoken: set[int],
    ) -> Iterator[Turn]:
        """The turns that lie in a stretch of text."""
        edges = [0, *accumulate(len(self.tokenizer.token_bytes[token] or b"") for token in ids)]
        begin = len(stretch.prefix)
        for part in stretch.parts:
            end = begin + len(part.text.encode())
            if part.message in spoken and end > begin:
                # What a tokenizer puts before a text is known to it, as at the start of a document.
                prefix = stretch.prefix if begin == len(stretch.prefix) else b""
                first, last = bisect_left(edges, begin - len(prefix)), bisect_right(edges, end) - 1
                end_token = follows if edges[last] == end == edges[-1] else None
                if first < last or (first == last and end_token is not None):
                    at = message_starts[part.message] - begin
                    yield Turn(
                        message=part.message,
                        start=at + max(edges[first], begin),
                        end=at + edges[last],
                        first=first_token + first,
                        last=first_token + last,
                        prefix=prefix,
                        end_token=end_token,
                    )
            begin = end
