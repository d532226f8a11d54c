"""Transfer section of the student: how rows are made when the tokenizer changes."""

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section, added

InputRows = Literal["auto", "mean", "length_mean", "norm", "first", "last", "lexicon"]
OutputRows = Literal["auto", "mean", "length_mean", "norm", "first", "last", "lexicon", "first_likelihood"]


class TransferConfig(Section):
    """The rows of tokens that the old tokenizer spells in several pieces, when the tokenizer changes."""

    input: InputRows = Field(
        "auto",
        json_schema_extra=added("0.2.0", "mean"),
        description="Embedding rows: lexicon (what the old model's lower layers make of the pieces, turned into a row "
        "as its own tokens' rows are); mean, length_mean (weighted by bytes), first or last of the pieces' rows, each "
        "times averaged_row_scale; norm (their mean at their mean length). auto: lexicon, or mean where too few old "
        "tokens teach it.",
    )
    output: OutputRows = Field(
        "auto",
        json_schema_extra=added("0.2.0", "mean"),
        description="Head rows: as input, or first_likelihood (the first piece's row, and the log-likelihood that the "
        "old model gives the other pieces after it). auto: as the input where the head is the embedding or the input "
        "is not lexicon; else first_likelihood.",
    )
    tie: Literal["keep", "untie"] = Field(
        "keep",
        json_schema_extra=added("0.2.0", "keep"),
        description="untie: a model whose head is its embedding gets a head of its own, with as many more weights.",
    )
