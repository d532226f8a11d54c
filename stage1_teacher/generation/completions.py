"""Completions as rows of a corpus: which are kept, which are left out, and why."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config import GenerateConfig
from pipeline.tokenization.byte_tokenizer import SpellingError
from pipeline.tokenization.chat_template import ASSISTANT, ChatError
from pipeline.tokenization.conversation import Conversation, Message, split_reasoning
from schemas.record import Segment
from schemas.text_corpus import WrittenText
from stage1_teacher.generation.base import Drawn, written_bytes
from stage1_teacher.generation.prompts import Prompt
from stage1_teacher.generation.writer import Writer

EMPTY = "an empty completion"
DUPLICATE = "the same as an earlier completion of its prompt"
UNFINISHED = "unfinished at generate.max_new_tokens"
LOOPS = "it repeats itself up to generate.max_new_tokens"
CONTROL = "it holds a control token"
NOT_UTF8 = "its tokens do not spell UTF-8"
CUT_REASONING = "it ends within its reasoning"
_OPEN, _CLOSE = "<think>", "</think>"
_MAX_PERIOD, _MIN_REPEATED = 64, 32  # tokens


class LeftOutError(ValueError):
    """A completion is not kept; the message is the reason."""


class Written(NamedTuple):
    """A completion as text.

    Attributes:
        is_ended: the model ended it by itself.
    """

    text: str
    is_ended: bool


def read_completion(drawn: Drawn, writer: Writer, config: GenerateConfig) -> Written:
    """Return what tokens say. Raises LeftOutError.

    Bytes are those of the tokens. Of a completion that was cut off, by its length or at a text to stop at, an
    incomplete last character is dropped; any other that is not UTF-8 is left out.
    """
    spelled = writer.tokenizer.token_bytes
    if any(token >= len(spelled) or spelled[token] is None for token in drawn.tokens):
        raise LeftOutError(CONTROL)
    content = written_bytes(drawn.tokens, writer.tokenizer)
    stops = [at for text in config.stop if (at := content.find(text.encode())) >= 0]
    if stops:
        content = content[: min(stops)]
    is_ended = drawn.is_ended and not stops
    if not is_ended and not stops:
        if repeats_itself(drawn.tokens):
            raise LeftOutError(LOOPS)
        if config.unfinished == "drop":
            raise LeftOutError(UNFINISHED)
    text = _decoded(content, may_be_cut=not is_ended)
    if not text.strip():
        raise LeftOutError(EMPTY)
    return Written(text, is_ended)


def _decoded(content: bytes, may_be_cut: bool) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if may_be_cut and error.end == len(content) and error.reason == "unexpected end of data":
            return content[: error.start].decode("utf-8")
        raise LeftOutError(NOT_UTF8) from error


def repeats_itself(tokens: Sequence[int]) -> bool:
    """Return whether a completion ends in a loop: a sequence of at most 64 tokens, at least four times in a row.

    A loop of few tokens must be 32 tokens long behind its first round.
    """
    for period in range(1, min(_MAX_PERIOD, len(tokens) // 4) + 1):
        repeated = max(3 * period, _MIN_REPEATED)
        if repeated + period <= len(tokens) and tokens[-repeated:] == tokens[-repeated - period : -period]:
            return True
    return False


def make_row(
    prompt: Prompt, number: int, seed: int, drawn: Drawn, writer: Writer, config: GenerateConfig
) -> WrittenText:
    """Make the row of a completion. Raises LeftOutError."""
    text, is_ended = read_completion(drawn, writer, config)
    segments: tuple[Segment, ...] = ()
    conversation: Conversation | None = None
    if prompt.conversation is None:
        start, length = len(prompt.text.encode()), len(text.encode())
        segments = (Segment(start, length, is_ended),)
        text = prompt.text + text
    else:
        conversation = _answered(prompt, text, is_ended, writer, config)
        text = ""
    messages = () if conversation is None else conversation.messages
    return WrittenText(
        doc_id=f"{prompt.doc_id}/{number}",
        text=text,
        segments=segments,
        messages=tuple(map(_columns, messages)),
        tools=json.dumps(conversation.tools, ensure_ascii=False) if conversation and conversation.tools else "",
        supervised_messages=(len(messages) - 1,) if messages else (),
        is_finished=is_ended,
        prompt_id=prompt.doc_id,
        completion=number,
        seed=seed,
        num_tokens=len(drawn.tokens) + drawn.is_ended,
    )


def _answered(prompt: Prompt, text: str, is_ended: bool, writer: Writer, config: GenerateConfig) -> Conversation:
    """Return the conversation with its answer, as the writer's template writes it. Raises LeftOutError.

    A template may strip white space, which models write around an answer: then so is the answer.
    """
    assert prompt.conversation is not None
    assert writer.chat is not None
    content, reasoning = text, ""
    if writer.chat.turn_template.forms.reasoning is not None:
        if prompt.tail.rstrip().endswith(_OPEN):
            text = f"{_OPEN}\n{text.lstrip()}"
        if (split := split_reasoning(text)) is not None:
            reasoning, content = split
        elif text.lstrip().startswith(_OPEN):
            raise LeftOutError(CUT_REASONING)
    if not content.strip():
        raise LeftOutError(EMPTY if is_ended else CUT_REASONING)
    kept = {"reasoning": reasoning} if reasoning and config.reasoning == "keep" else {}
    fault: ChatError | SpellingError | None = None
    for said in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
        answer: Message = {"role": ASSISTANT, "content": said, **kept}
        conversation = Conversation((*prompt.conversation.messages, answer), prompt.conversation.tools)
        try:
            _require_writable(conversation, writer)
        except (ChatError, SpellingError) as error:
            fault = fault or error
        else:
            return conversation
    assert fault is not None
    raise LeftOutError(fault.reason)


def _require_writable(conversation: Conversation, writer: Writer) -> None:
    """Raise ChatError or SpellingError unless the writer's template writes the conversation as a dump requires it."""
    assert writer.chat is not None
    beyond = writer.chat.beyond_contents(conversation)
    if beyond is None:
        writer.chat.encode(conversation.contents)
    else:
        writer.chat.encode(writer.chat.excerpts(beyond)[-1])


def _columns(message: Message) -> dict[str, str]:
    """Return a message as a row's column holds it."""
    values = {"role": message["role"], "content": message["content"]}
    values |= {"reasoning_content": message["reasoning"]} if message.get("reasoning") else {}
    if message.get("tool_calls"):
        values["tool_calls"] = json.dumps(message["tool_calls"], ensure_ascii=False)
    return values | {key: str(message[key]) for key in ("tool_call_id", "name") if message.get(key)}
