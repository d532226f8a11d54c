"""Models moved to another tokenizer without a recipe's files."""

import copy
from pathlib import Path
from typing import Any

from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage2_student.model.old_model import OldModel
from stage2_student.model.row_starts import Move
from stage2_student.model.vocabulary_transfer import TransferCounts, plan_move, transfer
from tests.support.small_dumps import make_recipe

NOWHERE = Path("nowhere")


def planned(
    model: Any, old: ByteTokenizer, new: ByteTokenizer, controls: dict[int, int] | None = None, **student: Any
) -> Move:
    """Plan the move of a model; `student` holds keys of the recipe's section."""
    recipe = make_recipe(
        NOWHERE,
        NOWHERE,
        NOWHERE,
        {},
        **{"averaged_row_scale": 1.0, "transfer": {"input": "mean", "output": "mean"}, **student},
    )
    before = copy.deepcopy(model).float()
    old_model = OldModel(lambda: before, "old", model.get_input_embeddings().weight.shape[0], old.default_start)
    start_id = 0 if new.default_start is None else new.default_start
    return plan_move(recipe, (old, new), controls or {}, start_id, old_model)


def move(
    model: Any, old: ByteTokenizer, new: ByteTokenizer, controls: dict[int, int] | None = None, **student: Any
) -> TransferCounts:
    """Move a model in place, plain Fast Vocabulary Transfer unless `student` says otherwise."""
    return transfer(model, planned(model, old, new, controls, **student)).counts
