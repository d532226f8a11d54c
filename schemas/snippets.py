"""The specification's snippets for reading a dump: written once, in README.md beside this file.

They are run by the tests and shown in every dump's card.
"""

import re
from pathlib import Path
from typing import NamedTuple

from schemas import SCHEMA_VERSION

_MARKED = re.compile(
    r"<!-- snippet(?P<older> of versions 1 and 2)?: (?P<name>\w+) -->\n```(?P<language>\w+)\n(?P<code>.*?)```",
    re.DOTALL,
)


class Snippet(NamedTuple):
    """Code to run in a dump's folder."""

    language: str
    code: str


def snippets(text: str | None = None, version: int = SCHEMA_VERSION) -> dict[str, Snippet]:
    """Return the marked snippets of a Markdown text, by name; by default those of the specification.

    Args:
        version: of the format that they read.
    """
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8") if text is None else text
    found = (match for match in _MARKED.finditer(text) if bool(match["older"]) == (version < 3))
    return {match["name"]: Snippet(match["language"], match["code"]) for match in found}
