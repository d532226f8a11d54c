"""Ways to start the rows of a moved student, a module each; `INPUT_ROWS` and `OUTPUT_ROWS` are the only lists of them.

A way is a function of the move (`base.Move`) and the old rows. May import `pipeline`, and of this stage nothing above
`model`.
"""

from stage2_student.model.row_starts.base import IN_PIECES, Move, NewRows, RowStart
from stage2_student.model.row_starts.choice import chosen_kinds
from stage2_student.model.row_starts.lexicon import lexicon
from stage2_student.model.row_starts.likelihood import first_likelihood
from stage2_student.model.row_starts.pieces import first, last, length_mean, mean, norm

__all__ = ["INPUT_ROWS", "IN_PIECES", "OUTPUT_ROWS", "Move", "NewRows", "RowStart", "chosen_kinds"]

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
