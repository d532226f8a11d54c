"""Keys of documents: two that share one are duplicates to `corpus.unique` and `corpus.exclude`."""

import hashlib
import re

from pipeline.corpus.key_set import KEY_BYTES


class KeyFinder:
    """The keys of texts: the named groups of a pattern, or the whole text without one or without a match."""

    def __init__(self, pattern: str | None) -> None:
        """Compile the pattern. Raises ValueError if it is none, or names no group."""
        self._pattern = _compiled(pattern)

    def keys(self, text: bytes) -> set[bytes]:
        """Return a text's keys, 16 bytes each."""
        match = self._pattern.match(text.decode("utf-8")) if self._pattern else None
        named = match.groupdict() if match else {}
        groups = {name: value for name, value in named.items() if value} or {"": text.decode("utf-8")}
        return {
            hashlib.blake2b(f"{name}\0{value}".encode(), digest_size=KEY_BYTES).digest()
            for name, value in groups.items()
        }


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"key_pattern {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groupindex:
        raise ValueError(
            f"key_pattern {pattern!r} names no group; name the parts that make up a key, as in (?P<title>...)"
        )
    return compiled
