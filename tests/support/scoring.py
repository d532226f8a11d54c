"""Bits per byte of a loaded model, on plain text or chats; models and corpora to score."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from pipeline.config import CorpusConfig
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.chat_tokenizer import ChatTokenizer
from stage2_student.evaluation.bits_per_byte import evaluate
from stage2_student.evaluation.scored_text import Reader, scored_text
from stage2_student.evaluation.spelled_text import Text
from tests.support.tiny import save_tiny, tiny_tokenizer


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


def normalising_model(folder: Path) -> Path:
    """Make a model whose tokenizer cannot spell a decomposed accent."""
    wrapped = tiny_tokenizer()
    wrapped.backend_tokenizer.normalizer = normalizers.NFC()
    return save_tiny(folder, wrapped, seed=5)


def named_corpus(path: Path, *texts: str) -> CorpusConfig:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return CorpusConfig(source=str(path), id_field="id")
