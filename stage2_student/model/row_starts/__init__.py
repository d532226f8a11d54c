"""Ways to start the rows of a moved student, a module each; `INPUT_ROWS` and `OUTPUT_ROWS` are the only lists of them.

A way is a function of the move (`base.Move`) and the old rows; a new one is a Python file anywhere, named as
`student.transfer.input` or `output` in the recipe (`stage2_student/interfaces/README.md`). May import `pipeline`, and
of this stage nothing above `model`.
"""

import torch
from torch import Tensor

from pipeline.runtime.plugins import describe_fault, is_own, run_file
from stage2_student.model.row_starts.base import IN_PIECES, Move, NewRows, RowStart
from stage2_student.model.row_starts.choice import chosen_kinds
from stage2_student.model.row_starts.lexicon import lexicon
from stage2_student.model.row_starts.likelihood import first_likelihood
from stage2_student.model.row_starts.pieces import first, last, length_mean, mean, norm

__all__ = ["INPUT_ROWS", "IN_PIECES", "OUTPUT_ROWS", "Move", "NewRows", "RowStart", "chosen_kinds", "make_rows"]

# By name, as in `student.transfer.input` and `student.transfer.output`.
INPUT_ROWS: dict[str, RowStart] = {
    "mean": mean,
    "length_mean": length_mean,
    "norm": norm,
    "first": first,
    "last": last,
    "lexicon": lexicon,
}
OUTPUT_ROWS: dict[str, RowStart] = {**INPUT_ROWS, "first_likelihood": first_likelihood}


def make_rows(kind: str, move: Move, weight_OD: Tensor) -> NewRows:
    """Make a new vocabulary's rows in one of these ways, or in the user's own.

    Args:
        kind: a name of `OUTPUT_ROWS`, or a Python file that defines `make_rows(move, weight_OD) -> NewRows`.
        weight_OD: the old embedding, or the old head.
    Raises:
        ValueError: the user's own file is faulty, or its rows do not fit.
    """
    if not is_own(kind):
        return OUTPUT_ROWS[kind](move, weight_OD)
    make = run_file(kind, "make_rows")
    try:
        made = make(move, weight_OD)
    except Exception as error:
        raise ValueError(describe_fault(kind, error)) from error
    shape, width = (len(move.sources), int(weight_OD.shape[1])), "tokens of the new vocabulary x hidden width"
    if not isinstance(made, NewRows):
        raise ValueError(f"{kind}: make_rows must return a row_starts.NewRows, not a {type(made).__name__}")
    if tuple(made.rows_VD.shape) != shape or not torch.isfinite(made.rows_VD).all():
        raise ValueError(f"{kind}: make_rows must return finite rows of shape {shape}, {width}")
    if made.bias_V is not None and (tuple(made.bias_V.shape) != shape[:1] or not torch.isfinite(made.bias_V).all()):
        raise ValueError(f"{kind}: make_rows must return a finite bias of shape {shape[:1]}, or None")
    return made
