"""Model to evaluate, as the command line or a recipe names it."""

from typing import NamedTuple

from pipeline.runtime.model_source import ModelSource


class EvaluatedModel(NamedTuple):
    """A model to evaluate.

    Attributes:
        name: its name in figures.
        source: its source, not resolved yet.
        start: the token put before a document; None: the tokenizer's own.
        end: the token that ends a document, or several if a teacher was dumped so; None: the tokenizer's own.
    """

    name: str
    source: ModelSource
    start: str | None = None
    end: str | tuple[str, ...] | None = None
