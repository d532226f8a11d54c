"""The protocol of row starts: what a move to another tokenizer gives them, and what they return.

Shape legend: V tokens of the new vocabulary, O rows of the old model, D hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from pipeline.config import Recipe
from pipeline.tokenization.yielded_tokens import Tokenizing
from stage2_student.model.old_model import OldModel

IN_PIECES = ("averaged", "fallback")  # kinds of tokens whose rows are made, not copied


class Move(NamedTuple):
    """A model's move to another tokenizer.

    Attributes:
        recipe: the run's, with all settings and the corpus.
        old, new: the tokenizers.
        sources: the old tokens that spell each new token; empty: its row is the mean of all rows.
        parts: the two old tokens that spell each old token, where two do.
        kinds: what each new token is (`stage2_student.model.row_sources.KINDS`).
        start_id: the new token that begins a text.
        old_model: the model before the move; it is loaded when it is first asked.
    """

    recipe: Recipe
    old: Tokenizing
    new: Tokenizing
    sources: Sequence[Sequence[int]]
    parts: Mapping[int, tuple[int, int]]
    kinds: Sequence[str]
    start_id: int
    old_model: OldModel


class NewRows(NamedTuple):
    """The rows of a new vocabulary.

    Attributes:
        rows_VD: float32. Rows of tokens that are not `IN_PIECES` are those of `mean`: copied, or the mean of all rows.
        bias_V: float32, added to the model's logits of these tokens, after its scaling; None for none.
        facts: what an operator should know of how they were made; `transfer.json` has them.
    """

    rows_VD: Tensor
    bias_V: Tensor | None = None
    facts: Mapping[str, float] = MappingProxyType({})


RowStart = Callable[[Move, Tensor], NewRows]  # the old embedding or head (O, D) -> the new one
