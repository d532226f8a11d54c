"""A tokenizer seen as bytes: which bytes each id spells, and an encoding that is checked to spell the document.

Everything comes from the tokenizer's own definition (tokenizer.json), never from decoding: `decode` cleans up, and half
a character does not survive it. Control tokens spell nothing and are never produced by text, whatever the text says.
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
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # the others are in no UTF-8 text


class SpellingError(ValueError):
    """The tokens do not spell the document. `reason` is short, and the same for all documents with that fault."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer whose every encoding is checked: the tokens' bytes are `prefix + document`.

    Attributes:
        token_bytes: by id; None spells nothing (control tokens, unused slots).
        prefix: what comes before every document: b"", or b" " (the dummy prefix of SentencePiece).
        default_start: the id the tokenizer itself puts first, else its bos, else its eos token; None if it has none.
        default_end: its eos token's id; None if it has none.
        sha256: hex digest of what decides ids and bytes; control tokens' names count, chat templates do not.
        control: name -> id of the tokens that spell nothing.
        normalizers: the tokenizer's normalizers that can alter text, by name; a document they alter is refused.
        prefixing: before which stretches of a text with control tokens in it the tokenizer itself puts `prefix`.
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
        """Token ids of a document, without start or end. Raises SpellingError if they would not spell it exactly."""
        [ids] = self.encode_batch([document])
        if isinstance(ids, SpellingError):
            raise ids
        return ids

    def encode_batch(
        self, documents: Sequence[bytes], prefixes: Sequence[bytes] | None = None
    ) -> list[list[int] | SpellingError]:
        """Like `encode`, for many documents at once; what is wrong with one is returned in its place.

        Args:
            prefixes: what comes before each instead of `prefix`: for what is not a whole document.
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
        """What the tokenizer itself puts before a stretch of text between control tokens; `first`: none comes before
        it.
        """
        prefixed = (first or self.prefixing.every_stretch) and not (
            self.prefixing.unless_space and stretch.startswith(b" ")
        )
        return self.prefix if prefixed else b""

    def _checked(self, ids: list[int], prefix: bytes, document: bytes) -> list[int] | SpellingError:
        spelled = [self.token_bytes[token] for token in ids]
        wanted = prefix + document
        have = b"".join(token or b"" for token in spelled)
        if have == wanted and None not in spelled:
            return ids
        shorter = min(len(have), len(wanted))
        at = next((i for i in range(shorter) if have[i] != wanted[i]), shorter)
        reason = self._reason(wanted, at)
        return SpellingError(
            f"the tokens do not spell the document: at byte {at - len(prefix)} it has {wanted[at : at + 8]!r} "
            f"where they have {have[at : at + 8]!r}; {reason}. Leave the document out, or choose another tokenizer.",
            reason,
        )

    def _reason(self, wanted: bytes, at: int) -> str:
        text = wanted.decode("utf-8")
        if self.normalizers:
            changed = self._encoder.normalizer.normalize_str(text)
            if changed.replace(_SPACE, " ") != text.replace(_SPACE, " "):
                return f"its normalizer ({', '.join(self.normalizers)}) changes the text"
        if _SPACE.encode() in wanted[max(at - 2, 0) : at + 3]:
            return "the tokenizer writes a space as U+2581, and takes that character in a text for a space"
        return "its vocabulary cannot spell these bytes"

    def remarks(self) -> list[str]:
        """What it cannot spell, a sentence each; empty for a tokenizer that spells every document."""
        found = []
        if self.normalizers:
            found.append(f"normalises text ({', '.join(self.normalizers)}): documents that change under it")
        if isinstance(self.encode_batch([_SPACE.encode()])[0], SpellingError):
            found.append("writes a space as U+2581: documents with that character")
        have = {token[0] for token in self.token_bytes if token is not None and len(token) == 1}
        lacking = sorted(_UTF8_BYTES - have)
        if lacking:
            found.append(f"has no tokens for the bytes {bytes(lacking).hex(' ')}: documents with them")
        return [f"{what} are counted and left out" for what in found]

    def token_id(self, spelling: str) -> int:
        """Id of a control token by its name. Raises ValueError naming the nearest ones."""
        if spelling in self.control:
            return self.control[spelling]
        near = difflib.get_close_matches(spelling, self.control, n=3, cutoff=0.3) or sorted(self.control)[:5]
        raise ValueError(
            f"the tokenizer has no control token {spelling!r}; the nearest it has: {', '.join(near) or 'none at all'}"
        )

    @classmethod
    def load(cls, source: ModelSource | str) -> "ByteTokenizer":
        """Load it by AutoTokenizer. Raises ValueError, with the reason, for one that cannot spell bytes."""
        return cls.from_wrapped(load_tokenizer(source), as_source(source).source)

    @classmethod
    def from_wrapped(cls, wrapped: Any, name: str) -> "ByteTokenizer":
        """From a transformers tokenizer; `name` is what errors call it."""
        backend = getattr(wrapped, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{name}: {type(wrapped).__name__} has no tokenizer.json, so its bytes are not known. "
                "Choose a tokenizer that has one; the source `bytes` is a tokenizer of the 256 bytes."
            )
        try:
            return cls.from_definition(json.loads(backend.to_str()), wrapped.bos_token_id, wrapped.eos_token_id)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def from_definition(cls, definition: dict[str, Any], bos: int | None, eos: int | None) -> "ByteTokenizer":
        """From a parsed tokenizer.json. `bos` and `eos` are ids."""
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
    """The control token that the tokenizer itself puts before a text, found with a model of one token: that loads at
    once.
    """
    letter = len(token_bytes)
    probe = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": letter}, "merges": []}, "added_tokens": []}
    ids = Tokenizer.from_str(json.dumps(probe | {"post_processor": definition.get("post_processor")})).encode("a").ids
    return None if ids[0] == letter or token_bytes[ids[0]] is not None else ids[0]


def _fingerprint(definition: dict[str, Any]) -> str:
    decisive = {key: definition.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
