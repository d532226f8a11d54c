"""Chats as a dump stores them, and each turn as transformers alone renders it when it comes."""

from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.tokenization.chat_template import TODAY
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from pipeline.tokenization.conversation import Conversation, join_reasoning
from schemas.record import Record, RecordText
from stage1_teacher.inputs.encoded_windows import EncodedWindow
from stage2_student.data.encode import Pieces, count_pieces, encode_pieces
from stage2_student.data.examples import Encoded, Example, Masks, make_example
from tests.support.chat_turns import answer, result, talk, user
from tests.support.small_dumps import make_record

MASKS = Masks(max_doubt=1.0, max_token_end=1.0)
ENDS = {"qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "smollm3": "<|im_end|>", "llama3_1": "<|eot_id|>"}


def record_of(piece: EncodedWindow, rng: np.random.Generator) -> Record:
    """Make a record with made-up targets.

    The first entry of position `p` has the log-probability -(p + 1) / 256.
    """
    record = make_record(piece.doc_id, piece.text, rng, [segment for span in piece.spans for segment in span.segments])
    logprobs = record.logprobs.copy()
    logprobs[::4] = -(np.arange(record.num_positions) + 1) / 256
    return replace(
        record,
        window_start=piece.bounds.start,
        logprobs=logprobs,
        message_roles=piece.roles,
        message_lengths=piece.lengths,
        conversation=piece.conversation,
    )


def text_of(record: Record) -> RecordText:
    return RecordText(**{name: getattr(record, name) for name in RecordText._fields})


def example_of(encoded: Encoded, loaded: ChatTokenizer) -> Example:
    end = loaded.end_of_turn()
    assert end is not None
    return make_example(encoded, 77, end, None, MASKS)


def rows_of(example: Example) -> list[int]:
    """Return the record's position of each supervised one; check that it is that of its symbol."""
    assert (example.entry_symbols_PE[:, 0] == example.symbols_P).all()
    return [round(-256 * float(logprob)) - 1 for logprob in example.entry_logprobs_PE[:, 0]]


def rows_of_messages(record: Record) -> dict[int, list[int]]:
    """Count out the positions of each message that the record asks about, one by one."""
    owner = [number for number, size in enumerate(record.message_lengths) for _ in range(size)]
    found: dict[int, list[int]] = {}
    row = 0
    for segment in record.segments:
        number = owner[segment.start] if segment.length else owner[segment.start - 1]
        found.setdefault(number, []).extend(range(row, row + segment.num_positions))
        row += segment.num_positions
    return found


def pieces_of(record: Record, loaded: ChatTokenizer, max_tokens: int | None) -> tuple[list[Encoded], Pieces] | str:
    """Return what is used of a record and its counts, which must be those of its text, too."""
    [pieces] = encode_pieces([record], loaded.tokenizer, loaded, max_tokens)
    [counted] = count_pieces([text_of(record)], loaded.tokenizer, loaded, max_tokens)
    assert list(count_pieces([record], loaded.tokenizer, loaded, max_tokens)) == [counted]
    if isinstance(pieces, str) or isinstance(counted, str):
        assert pieces == counted
        return pieces
    assert counted.tokens == tuple(piece.num_tokens for piece in pieces)
    return pieces, counted


def given(conversation: Conversation, family: str) -> list[dict[str, Any]]:
    """Return messages as transformers takes them for that template."""
    messages = []
    for message in conversation.messages:
        made: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        reasoning = message.get("reasoning")
        made |= {"reasoning_content": reasoning} if reasoning and family == "qwen3" else {}
        made |= {"content": join_reasoning(reasoning, message["content"])} if reasoning and family == "smollm3" else {}
        calls = [
            {"function": {key: call[key] for key in ("name", "arguments")}} for call in message.get("tool_calls", ())
        ]
        made |= {"tool_calls": calls} if calls else {}
        messages.append(made)
    return messages


def as_it_comes(conversation: Conversation, index: int, family: str, wrapped: Any) -> tuple[str, str]:
    """Return (text before a turn, the turn) when it has just been said.

    No turn if the template does not begin it with its prompt.
    """
    messages, reasons = given(conversation, family), bool(conversation.messages[index].get("reasoning"))
    options = {
        "tools": [dict(tool) for tool in conversation.tools] or None,
        "tokenize": False,
        "strftime_now": TODAY.strftime,
    }
    options |= {"enable_thinking": reasons, "thinking": reasons}
    prompt = wrapped.apply_chat_template(messages[:index], add_generation_prompt=True, **options)
    text = wrapped.apply_chat_template(messages[: index + 1], **options)
    if not text.startswith(prompt):  # two turns in a row, of which Qwen3's template writes the first otherwise then
        return prompt, ""
    return prompt, text[len(prompt) : text.index(ENDS[family], len(prompt))]


def random_talk(rng: np.random.Generator, reasoning: float) -> Conversation:
    words = ["the", "and", "thing", "in é", "7", "an\nand", "ing"]

    def text(most: int = 3) -> str:
        return " ".join(rng.choice(words, int(rng.integers(1, most + 1))))

    messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] * int(rng.integers(0, 2))
    for _ in range(int(rng.integers(2, 6))):
        messages.append(user(text()))
        if rng.random() < 0.3:
            messages += [answer("", text() if rng.random() < reasoning else "", where=text()), result(text())]
        messages.append(answer("" if rng.random() < 0.1 else text(), text(8) if rng.random() < reasoning else ""))
        if rng.random() < 0.1:
            messages.append(answer(text()))  # two in a row
    return talk(*messages, tools=bool(rng.integers(0, 2)) or any(m.get("tool_calls") for m in messages))
