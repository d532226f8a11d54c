"""Types of the sums over a head's columns.

Shape legend: R rows of a chunk, V columns of the head by token id, C the same columns ordered by their bytes, I cells.
"""

from typing import NamedTuple

from torch import Tensor


class Columns(NamedTuple):
    """A head's columns ordered by their bytes: those that spell bytes, those that mean END, all others."""

    token_C: Tensor  # int32
    column_V: Tensor  # int32, the inverse
    num_text_tokens: int
    num_end: int


class Cells(NamedTuple):
    """The cells of consecutive rows, and two tokens of each row whose log-probability is needed."""

    num_cells_R: Tensor
    first_I: Tensor
    last_I: Tensor
    tokens_R2: Tensor  # int64; negative for none


class Sums(NamedTuple):
    """Sums of the softmax of some rows. float64."""

    mass_I: Tensor
    end_R: Tensor
    logprob_R2: Tensor  # 0 for no token
