"""Byte view of a tokenizer: the bytes of each id, and encodings that are checked to spell the document.

Everything comes from the tokenizer's own definition (tokenizer.json), never from decoding: `decode` cleans up text and
does not preserve partial characters. Control tokens spell nothing and are never produced by text, whatever it says.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from pipeline.runtime.huggingface import load_tokenizer
from pipeline.runtime.model_source import ModelSource, as_source
from pipeline.tokenization.byte_spelling import Prefixing, encoder_definition, prefixing, spellings, text_changers

_SPACE = "▁"
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # the other bytes never occur in UTF-8


class SpellingError(ValueError):
    """Tokens do not spell the document. `reason` is short, and the same for all documents with that fault."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer that checks every encoding: the tokens' bytes are `prefix + document`.

    Attributes:
        token_bytes: by id; None spells nothing (control tokens, unused slots).
        prefix: bytes before every document: b"", or b" " (the dummy prefix of SentencePiece).
        default_start: the id the tokenizer itself puts first, else its bos, else its eos token; None if it has none.
        default_end: its eos token's id; None if it has none.
        sha256: hex digest of everything that decides ids and bytes, including control tokens' names but not templates.
        control: ids of the tokens that spell nothing, by name.
        normalizers: names of its normalizers that can alter text; a document that they alter is refused.
        prefixing: where the tokenizer itself puts `prefix` in a text with control tokens.
    """

    token_bytes: tuple[bytes | None, ...]
    prefix: bytes
    default_start: int | None
    default_end: int | None
    sha256: str
    control: dict[str, int] = field(repr=False)
    normalizers: tuple[str, ...]
    prefixing: Prefixing
    _encoder: Tokenizer = field(repr=False, compare=False)

    def encode(self, document: bytes) -> list[int]:
        """Encode a document, without start or end. Raises SpellingError if the ids would not spell it exactly."""
        [ids] = self.encode_batch([document])
        if isinstance(ids, SpellingError):
            raise ids
        return ids

    def encode_batch(
        self, documents: Sequence[bytes], prefixes: Sequence[bytes] | None = None
    ) -> list[list[int] | SpellingError]:
        """Encode many documents at once, as `encode` does; an error is returned in its document's place.

        Args:
            prefixes: bytes before each one instead of `prefix`, for texts that are not whole documents.
        """
        prefixes = [self.prefix] * len(documents) if prefixes is None else prefixes
        results: list[list[int] | SpellingError | None] = [None] * len(documents)
        texts: list[str] = []
        for index, (prefix, document) in enumerate(zip(prefixes, documents, strict=True)):
            try:
                texts.append((prefix + document).decode("utf-8"))
            except UnicodeDecodeError as error:
                offset = error.start - len(prefix)
                results[index] = SpellingError(
                    f"the document is not valid UTF-8 at byte {offset}: {document[offset : offset + 8]!r} "
                    f"({error.reason})",
                    "not valid UTF-8",
                )
        encodings = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))
        return [
            self._checked(next(encodings).ids, prefix, document) if result is None else result
            for result, prefix, document in zip(results, prefixes, documents, strict=True)
        ]

    def prefix_of(self, stretch: bytes, first: bool) -> bytes:
        """Return the prefix that the tokenizer itself puts before a stretch of text between control tokens.

        Args:
            first: no control token comes before it.
        """
        prefixed = (first or self.prefixing.every_stretch) and not (
            self.prefixing.unless_space and stretch.startswith(b" ")
        )
        return self.prefix if prefixed else b""

    def _checked(self, ids: list[int], prefix: bytes, document: bytes) -> list[int] | SpellingError:
        spelled = [self.token_bytes[token] for token in ids]
        expected = prefix + document
        actual = b"".join(token or b"" for token in spelled)
        if actual == expected and None not in spelled:
            return ids
        shorter = min(len(actual), len(expected))
        at = next((i for i in range(shorter) if actual[i] != expected[i]), shorter)
        reason = self._reason(expected, at)
        return SpellingError(
            f"the tokens do not spell the document: at byte {at - len(prefix)} it has {expected[at : at + 8]!r} "
            f"where they have {actual[at : at + 8]!r}; {reason}. Leave the document out, or choose another tokenizer.",
            reason,
        )

    def _reason(self, text_bytes: bytes, at: int) -> str:
        text = text_bytes.decode("utf-8")
        if self.normalizers:
            changed = self._encoder.normalizer.normalize_str(text)
            if changed.replace(_SPACE, " ") != text.replace(_SPACE, " "):
                return f"its normalizer ({', '.join(self.normalizers)}) changes the text"
        if _SPACE.encode() in text_bytes[max(at - 2, 0) : at + 3]:
            return "the tokenizer writes a space as U+2581, and takes that character in a text for a space"
        return "its vocabulary cannot spell these bytes"

    def remarks(self) -> list[str]:
        """List what it cannot spell, a sentence each; empty for a tokenizer that spells every document."""
        limits = []
        if self.normalizers:
            limits.append(f"normalises text ({', '.join(self.normalizers)}): documents that change under it")
        if isinstance(self.encode_batch([_SPACE.encode()])[0], SpellingError):
            limits.append("writes a space as U+2581: documents with that character")
        single_bytes = {token[0] for token in self.token_bytes if token is not None and len(token) == 1}
        lacking = sorted(_UTF8_BYTES - single_bytes)
        if lacking:
            limits.append(f"has no tokens for the bytes {bytes(lacking).hex(' ')}: documents with them")
        return [f"{what} are counted and left out" for what in limits]

    def token_id(self, spelling: str) -> int:
        """Look up a control token's id by name. Raises ValueError that lists the closest names."""
        if spelling in self.control:
            return self.control[spelling]
        near = difflib.get_close_matches(spelling, self.control, n=3, cutoff=0.3) or sorted(self.control)[:5]
        raise ValueError(
            f"the tokenizer has no control token {spelling!r}; the closest it has: {', '.join(near) or 'none at all'}"
        )

    @classmethod
    def load(cls, source: ModelSource | str) -> "ByteTokenizer":
        """Load a tokenizer with AutoTokenizer. Raises ValueError, with the reason, if it cannot spell bytes."""
        return cls.from_wrapped(load_tokenizer(source), as_source(source).source)

    @classmethod
    def from_wrapped(cls, wrapped: Any, name: str) -> "ByteTokenizer":
        """Make it from a transformers tokenizer; `name` is its name in errors."""
        backend = getattr(wrapped, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{name}: {type(wrapped).__name__} has no tokenizer.json, so its bytes are unknown. "
                "Choose a tokenizer that has one; the source `bytes` is a tokenizer of the 256 bytes."
            )
        try:
            return cls.from_definition(json.loads(backend.to_str()), wrapped.bos_token_id, wrapped.eos_token_id)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def from_definition(cls, definition: dict[str, Any], bos: int | None, eos: int | None) -> "ByteTokenizer":
        """Make it from a parsed tokenizer.json; `bos` and `eos` are ids."""
        token_bytes, control = spellings(definition)
        encoder_json, prefix = encoder_definition(definition, token_bytes)
        encoder = Tokenizer.from_str(json.dumps(encoder_json))
        encoder.encode_special_tokens = True  # text that spells a control token is text
        put_first = _put_first(definition, token_bytes)
        return cls(
            token_bytes=token_bytes,
            prefix=prefix,
            default_start=next((i for i in (put_first, bos, eos) if i is not None), None),
            default_end=eos,
            sha256=_fingerprint(definition),
            control=control,
            normalizers=text_changers(definition),
            prefixing=prefixing(definition),
            _encoder=encoder,
        )


def _put_first(definition: dict[str, Any], token_bytes: tuple[bytes | None, ...]) -> int | None:
    """Find the control token that the tokenizer itself puts before a text.

    Uses a model with a single token, which loads at once.
    """
    letter = len(token_bytes)
    probe = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": letter}, "merges": []}, "added_tokens": []}
    ids = Tokenizer.from_str(json.dumps(probe | {"post_processor": definition.get("post_processor")})).encode("a").ids
    return None if ids[0] == letter or token_bytes[ids[0]] is not None else ids[0]


def _fingerprint(definition: dict[str, Any]) -> str:
    decisive = {key: definition.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
