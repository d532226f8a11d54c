"""Conversations as model input: tokens, and the places in them of what the assistant says.

Control tokens are parsed only in the template's own text: a message that spells one is text. Between two control
tokens, template and contents are one stretch of text, encoded together as the model would see them. A token may
therefore hold bytes of both; its part of the assistant's words is then context, and not supervised.

The bytes of a chat are the contents of all its messages, joined in order, independent of any template. Offsets count
these bytes. In a chat with more than contents, the bytes of an assistant's turn are what the template writes for it:
see `pipeline.tokenization.assistant_turns`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from pipeline.runtime.huggingface import load_tokenizer
from pipeline.runtime.model_source import ModelSource, as_source
from pipeline.tokenization.assistant_turns import TurnTemplate
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_renderings import Written
from pipeline.tokenization.chat_template import ASSISTANT, ChatError, ChatTemplate, Message, Part
from pipeline.tokenization.control_tokens import ControlTokens, mended
from pipeline.tokenization.conversation import Conversation, Excerpt

_PROBE = [{"role": "user", "content": "Is it there?"}, {"role": ASSISTANT, "content": "Yes, it is there."}]


@dataclass(frozen=True)
class Turn:
    """The part of one assistant message that whole tokens hold, with nothing else in them.

    A message in which the template writes control tokens gives several turns.

    Attributes:
        message: the message's number; in a record's chat, the number of the record's message.
        start, end: bytes of the chat that the tokens hold.
        first, last: tokens `first .. last` of the chat hold them.
        prefix: bytes that the tokenizer put before the first of these tokens; part of what they spell.
        end_token: the control token that comes next; None if the last token reaches into the template, or text
            follows.
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
    """A chat's tokens, from the template's first to the end of the assistant's last turn.

    Neither `tokens` nor `turns` is ever empty; `contents` holds the bytes of each message.
    """

    tokens: list[int]
    turns: tuple[Turn, ...]
    contents: tuple[bytes, ...]


class _Stretch(NamedTuple):
    """Text between two control tokens."""

    prefix: bytes
    parts: list[Part]

    @property
    def text(self) -> bytes:
        return "".join(part.text for part in self.parts).encode()


class _Layout(NamedTuple):
    """A chat's control tokens by id with the text between them, the bytes of each message, and the supervised ones."""

    items: list[int | _Stretch]
    contents: tuple[bytes, ...]
    spoken: frozenset[int]


Chat = Sequence[Message] | Excerpt


def document_of(messages: Sequence[Message]) -> bytes:
    """Return the bytes of a chat."""
    return "".join(message["content"] for message in messages).encode()


class ChatTokenizer:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: ByteTokenizer, wrapped: Any) -> None:
        """Read the template of `wrapped`, the transformers tokenizer that `tokenizer` was made from.

        Raises ValueError if it has none.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(wrapped)
        self._control = ControlTokens(wrapped)

    @cached_property
    def turn_template(self) -> TurnTemplate:
        """Return the template's view of turns."""
        return TurnTemplate(self.template, self._control, self.end_of_turn())

    @classmethod
    def load(cls, source: ModelSource | str) -> "ChatTokenizer":
        """Load a tokenizer with AutoTokenizer.

        Raises ValueError if it has no template, or cannot spell bytes.
        """
        wrapped = load_tokenizer(source)
        name = as_source(source).source
        if wrapped.chat_template is None:
            raise ValueError(f"{name}: its tokenizer has no chat template, so no chat can be rendered")
        return cls(ByteTokenizer.from_wrapped(wrapped, name), wrapped)

    def encode(self, chat: Chat) -> EncodedChat:
        """Encode a chat into tokens and turns. Raises ChatError or SpellingError, each with its reason."""
        [encoded] = self.encode_batch([chat])
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded

    def encode_batch(self, chats: Sequence[Chat]) -> list[EncodedChat | ValueError]:
        """Encode many chats at once, as `encode` does; an error is returned in its chat's place."""
        return self.encode_written([self._written(chat) for chat in chats])

    def encode_written(self, chats: Sequence[Written | ChatError]) -> list[EncodedChat | ValueError]:
        """Encode chats that the template has written, as `encode_batch` does."""
        layouts = [chat if isinstance(chat, ChatError) else self._layout(chat) for chat in chats]
        stretches = [
            s for layout in layouts if isinstance(layout, _Layout) for s in layout.items if isinstance(s, _Stretch)
        ]
        encodings = iter(self.tokenizer.encode_batch([s.text for s in stretches], [s.prefix for s in stretches]))
        return [layout if isinstance(layout, ValueError) else self._encoded(layout, encodings) for layout in layouts]

    def beyond_contents(self, conversation: Conversation | None) -> Conversation | None:
        """Return a conversation as the template should see it; None if it has nothing beyond its contents.

        Reasoning in a content is plain text to a template that does not look for it there; for one that does, it is
        moved out of the content.
        """
        if conversation is None or (conversation.is_plain and self.turn_template.forms.reasoning is None):
            return None
        return self.turn_template.seen(conversation)

    def excerpts(self, conversation: Conversation) -> list[Excerpt]:
        """List the records that a conversation takes. Raises ChatError if the template does not write it whole."""
        return list(self.turn_template.excerpts(self.turn_template.seen(conversation)))

    def encode_prompt(self, conversation: Conversation, reasons: bool = False) -> tuple[list[int], str]:
        """Encode a conversation up to where the assistant's next turn begins; also return the text at its very end.

        Args:
            reasons: whether the turn is to have reasoning, if the template knows any.
        Raises ChatError or SpellingError, each with its reason.
        """
        text = self.turn_template.prompt(self.turn_template.seen(conversation), reasons)
        items: list[int | Part] = []
        at = 0
        for found in self._control.find(text):
            items += [Part(mended(text[at : found.start]), None)] if found.start > at else []
            items.append(found.token)
            at = found.end
        last = mended(text[at:])
        items += [Part(last, None)] if last else []
        stretches = [item for item in self._layout(Written(items, (), frozenset())).items if isinstance(item, _Stretch)]
        encoded = self.tokenizer.encode_batch([s.text for s in stretches], [s.prefix for s in stretches])
        encodings = iter(encoded)
        tokens: list[int] = []
        for item in items:
            ids = [item] if isinstance(item, int) else next(encodings)
            if isinstance(ids, ValueError):
                raise ids
            tokens += ids
        return tokens, last

    def end_of_turn(self) -> int | None:
        """Return the control token that the template puts after what the assistant says; None if there is none."""
        try:
            return self.encode(_PROBE).turns[-1].end_token
        except ChatError as error:
            raise ValueError(f"the chat template cannot write a question and its answer: {error}") from error

    def split(self, parts: Sequence[Part], messages: Sequence[Message], spoken: Iterable[int]) -> Written:
        """Separate a rendering of contents from its control tokens; `spoken` are the supervised ones of `messages`."""
        contents = tuple(message["content"].encode() for message in messages)
        return Written(list(self._split(parts)), contents, frozenset(spoken))

    def _written(self, chat: Chat) -> Written | ChatError:
        try:
            if isinstance(chat, Excerpt):
                return self.turn_template.write(chat)
            spoken = (index for index, message in enumerate(chat) if message["role"] == ASSISTANT)
            return self.split(self.template.render(chat), chat, spoken)
        except ChatError as error:
            return error

    def _layout(self, chat: Written) -> _Layout:
        items: list[int | _Stretch] = []
        for item in chat.items:
            if isinstance(item, int):
                items.append(item)
            elif items and isinstance(items[-1], _Stretch):
                items[-1].parts.append(item)
            else:
                items.append(_Stretch(b"", [item]))
        items = [
            item
            if isinstance(item, int)
            else item._replace(prefix=self.tokenizer.prefix_of(item.text, first=not index))
            for index, item in enumerate(items)
        ]
        return _Layout(items, chat.contents, chat.spoken)

    def _split(self, parts: Sequence[Part]) -> Iterator[int | Part]:
        """Yield the control tokens that the template writes, and the text around them."""
        for part in parts:
            at = 0
            for found in self._control.find(part.text) if part.message is None else ():
                if found.start > at:
                    yield Part(part.text[at : found.start], None)
                yield found.token
                at = found.end
            if len(part.text) > at:
                yield part._replace(text=part.text[at:])

    def _encoded(self, layout: _Layout, encodings: Iterator[list[int] | ValueError]) -> EncodedChat | ValueError:
        message_starts = [0, *accumulate(map(len, layout.contents))]
        tokens: list[int] = []
        turns: list[Turn] = []
        fault: ValueError | None = None
        for index, item in enumerate(layout.items):
            if isinstance(item, int):
                tokens.append(item)
                continue
            ids = next(encodings)
            if isinstance(ids, ValueError):
                fault = fault or ids
                continue
            follows = next(iter(layout.items[index + 1 : index + 2]), None)  # a control token, if anything follows
            assert not isinstance(follows, _Stretch)
            turns += self._turns(item, ids, len(tokens), follows, message_starts, layout.spoken)
            tokens += ids
        if fault is not None:
            return fault
        if not turns:
            return ChatError("no token holds only what the assistant says")
        if not turns[0].first:
            return ChatError("the chat template writes nothing before what the assistant says")
        last = turns[-1].last + (turns[-1].end_token is not None)
        return EncodedChat(tokens[:last], tuple(turns), layout.contents)

    def _turns(
        self,
        stretch: _Stretch,
        ids: Sequence[int],
        first_token: int,
        follows: int | None,
        message_starts: Sequence[int],
        spoken: frozenset[int],
    ) -> Iterator[Turn]:
        """Yield the turns in a stretch of text."""
        edges = [0, *accumulate(len(self.tokenizer.token_bytes[token] or b"") for token in ids)]
        begin = len(stretch.prefix)
        for part in stretch.parts:
            end = begin + len(part.text.encode())
            if part.message in spoken and end > begin:
                # The tokenizer knows what it puts before a text, as at the start of a document.
                prefix = stretch.prefix if begin == len(stretch.prefix) else b""
                first, last = bisect_left(edges, begin - len(prefix)), bisect_right(edges, end) - 1
                end_token = follows if edges[last] == end == edges[-1] else None
                if first < last or (first == last and end_token is not None):
                    at = message_starts[part.message] + part.at - begin
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
