"""Control tokens of a tokenizer, in text that a chat template has written.

Only the template may write one. If a message spells one, a mark is inserted into the spelling before the template sees
it, and removed from the template's output; so whatever still matches is the template's own.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_BREAK = "\ue0a2"  # private use: no template contains it, and none strips it


class Found(NamedTuple):
    """A control token at characters `start .. end` of a text."""

    start: int
    end: int
    token: int


class ControlTokens:
    """The special added tokens of a transformers tokenizer, by name."""

    def __init__(self, wrapped: Any) -> None:
        added = [(index, token) for index, token in wrapped.added_tokens_decoder.items() if token.special]
        self._ids = {token.content: index for index, token in added}
        added.sort(key=lambda item: -len(item[1].content))
        # Some control tokens absorb the white space next to them.
        patterns = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for _, token in added
        ]
        self._written = re.compile("|".join(patterns)) if patterns else None
        self._spelled = re.compile("|".join(re.escape(token.content) for _, token in added)) if added else None

    def find(self, text: str) -> Iterator[Found]:
        """Yield the control tokens in text that a template has written, in order."""
        for match in self._written.finditer(text) if self._written else ():
            name = match[0] if match[0] in self._ids else match[0].strip()
            yield Found(match.start(), match.end(), self._ids[name])

    def broken(self, value: Any) -> Any:
        """Copy texts, lists and mappings with a mark in each spelling of a control token; roles stay as they are."""
        if isinstance(value, str):
            return (
                self._spelled.sub(lambda found: found[0][0] + _BREAK + found[0][1:], value) if self._spelled else value
            )
        if isinstance(value, dict):
            return {self.broken(k): v if k == "role" else self.broken(v) for k, v in value.items()}
        return [self.broken(item) for item in value] if isinstance(value, list | tuple) else value


def mended(text: str) -> str:
    """Remove the marks that `ControlTokens.broken` puts into a text."""
    return text.replace(_BREAK, "")
