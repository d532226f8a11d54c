"""Supervised regions: the part of a document that is learned, while the rest is context."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section


class SuperviseConfig(Section):
    """The part of each document that is learned. Exactly one key; part of a dump's identity."""

    pattern: str | None = Field(
        None,
        description="Regular expression (Python's): what its matches hold is learned, or only what their group named "
        "`supervised` holds, as in '(?s)Answer: (?P<supervised>.*)'.",
    )
    field: str | None = Field(
        None,
        description="Column with the byte ranges that are learned: a list of [start, end) pairs into the text's UTF-8, "
        "ascending.",
    )
    turns: Literal["last"] | None = Field(
        None, description="`last`: of a chat's assistant, only the last turn is learned; earlier ones are context."
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _one_is_given(self) -> "SuperviseConfig":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of pattern, field and turns, not {' and '.join(given) or 'none'}")
        return self
