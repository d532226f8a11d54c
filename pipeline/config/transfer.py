"""Transfer section of the student: how rows are made when the tokenizer changes."""

from typing import Literal

from pydantic import Field, field_validator

from pipeline.config.section import Section, added
from pipeline.runtime.plugins import check_name, is_own

INPUT_ROWS = ("auto", "mean", "length_mean", "norm", "first", "last", "lexicon")
OUTPUT_ROWS = (*INPUT_ROWS, "first_likelihood")


class TransferConfig(Section):
    """The rows of tokens that the old tokenizer spells in several pieces, when the tokenizer changes."""

    input: str = Field(
        "auto",
        json_schema_extra=added("0.2.0", "mean"),
        description="Embedding rows: lexicon (what the old model's lower layers make of the pieces, turned into a row "
        "as its own tokens' rows are); mean, length_mean (weighted by bytes), first or last of the pieces' rows, each "
        "times averaged_row_scale; norm (their mean at their mean length). auto: lexicon, or mean where too few old "
        "tokens teach it. Or a Python file of your own.",
    )
    output: str = Field(
        "auto",
        json_schema_extra=added("0.2.0", "mean"),
        description="Head rows: as input, or first_likelihood (the first piece's row, and the log-likelihood that the "
        "old model gives the other pieces after it). auto: as the input where the head is the embedding or the input "
        "is not lexicon; else first_likelihood. Or a Python file of your own.",
    )
    tie: Literal["keep", "untie"] = Field(
        "keep",
        json_schema_extra=added("0.2.0", "keep"),
        description="untie: a model whose head is its embedding gets a head of its own, with as many more weights.",
    )

    @field_validator("input")
    @classmethod
    def _input_is_known(cls, name: str) -> str:
        return check_name(name, INPUT_ROWS, "kind of embedding rows")

    @field_validator("output")
    @classmethod
    def _output_is_known(cls, name: str) -> str:
        return check_name(name, OUTPUT_ROWS, "kind of head rows")

    @property
    def files(self) -> tuple[str, ...]:
        """Return the operator's own files that make rows."""
        return tuple(dict.fromkeys(name for name in (self.input, self.output) if is_own(name)))
