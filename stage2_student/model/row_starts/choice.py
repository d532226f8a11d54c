"""Choice of the rows that a student starts with, where the recipe leaves it open."""

from pipeline.config import student_config
from pipeline.runtime import log
from stage2_student.model.row_starts.base import IN_PIECES, Move

MIN_PARTS = 12_000  # old tokens that others spell: with as many the lexicon was measured to be closer than means


def chosen_kinds(move: Move, tied: bool) -> tuple[str, str]:
    """Return the kinds of embedding and head rows: the recipe's, and for `auto` the closest start that is possible.

    Args:
        tied: the head is the embedding.
    """
    config = student_config(move.recipe).transfer
    inputs: str = config.input
    outputs: str = config.output
    if tied and inputs == "auto" and outputs not in ("auto", "first_likelihood"):
        inputs = outputs
    if inputs == "auto":
        why_not = _without_lexicon(move)
        inputs = "mean" if why_not else "lexicon"
        if why_not and set(move.kinds) & set(IN_PIECES):
            log.info(f"new rows are means of their pieces' rows: {why_not}")
    if outputs == "auto":
        outputs = "first_likelihood" if inputs == "lexicon" and not tied else inputs
    return inputs, outputs


def _without_lexicon(move: Move) -> str:
    """Say why the lexicon cannot make this move's rows; empty if it can."""
    if not set(move.kinds) & set(IN_PIECES):
        return "no row is made"
    if len(move.parts) < MIN_PARTS:
        return f"{len(move.parts):,} tokens of the old vocabulary are spelled by two others, {MIN_PARTS:,} are needed"
    if not move.old_model.gives_states:
        return f"a model of type {move.old_model.model.config.model_type} does not give the states between its layers"
    return ""
