"""Rounds section: how often the student writes, the teacher scores what it wrote, and the student trains on it."""

from pydantic import Field

from pipeline.config.section import Section


class RoundsConfig(Section):
    """Rounds of text, dump and training, each from where the student stands after the one before."""

    path: str = Field(description="Folder of the rounds: round-01/ and so on, each with text/, dump/ and export/.")
    count: int = Field(2, ge=1, description="Rounds of the student's own text; more may be added later.")
    steps: int = Field(100, ge=1, description="Optimizer steps of each round; the run in student.path takes them.")
    cold_start: bool = Field(
        False,
        description="Begin with a round on text that the teacher writes, round-00. Needed if the student has not been "
        "trained yet.",
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the supervised bytes of every step that comes from the recipe's own dumps (student.dumps "
        "or dump.path); the rest is the round's text.",
    )
    next_prompts: bool = Field(
        False,
        description="Take the next generate.prompts.limit prompts in every round. Default: the same prompts, sampled "
        "with another seed.",
    )
    max_regression: float = Field(
        0.0,
        ge=0,
        description="Stop after a round whose held-out bits per byte (the mean over eval and eval.corpora) exceed the "
        "lowest so far by more than this.",
    )
