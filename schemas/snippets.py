"""The reading snippets of the specification (README.md beside this file): written there once, run by the tests, shown
in every card.
"""

import re
from pathlib import Path
from typing import NamedTuple

_MARKED = re.compile(r"<!-- snippet: (?P<name>\w+) -->\n```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


class Snippet(NamedTuple):
    """Code to run in a dump's folder."""

    language: str
    code: str


def snippets(text: str | None = None) -> dict[str, Snippet]:
    """Each snippet that a Markdown text marks, by name; of the specification, where no text is given."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8") if text is None else text
    return {match["name"]: Snippet(match["language"], match["code"]) for match in _MARKED.finditer(text)}
