"""Bits per byte of a loaded model, on plain text or chats."""

from collections.abc import Sequence
from typing import Any

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage2_student.evaluation.bits_per_byte import evaluate
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Text


def score(
    model: Any,
    tokenizer: ByteTokenizer,
    documents: Sequence[Text],
    start_id: int,
    max_tokens: int = 2048,
    chat: ChatTokenizer | None = None,
) -> dict[str, Any]:
    """Run `evaluate` on everything that this model can be asked about."""
    reader = Reader("model", tokenizer, chat, start_id)
    return evaluate(model, reader, documents, scored_text(documents, [reader]), max_tokens)
