"""A model that is measured, as the command line or a recipe names it."""

from typing import NamedTuple


class EvaluatedModel(NamedTuple):
    """A model to measure; `start` and `end` are tokens, None for its tokenizer's own. Several mean END where a teacher was dumped so."""

    name: str
    model: str
    start: str | None
    end: str | tuple[str, ...] | None
    revision: str | None = None
    trust_remote_code: bool = False
