"""Amounts of text that a student reads at once."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from stage2_student.model.context_length import sized
from tests.support.small_dumps import recipe_in


@pytest.mark.parametrize(("positions", "found"), [(512, 512), (4096, 2048)])
def test_what_the_student_reads_at_once_is_by_default_what_it_has_positions_for(
    tmp_path: Path, positions: int, found: int
) -> None:
    model = tmp_path / "model"
    LlamaConfig(max_position_embeddings=positions).save_pretrained(model)
    plain = recipe_in(tmp_path, max_tokens=None)  # its student is in that folder
    given, remark = sized(plain)
    assert given.train.max_tokens == given.train.piece_tokens == found
    assert (remark is not None) == (found < 2048) and (remark is None or "train.max_tokens is 512" in remark)
    explicit = plain.model_copy(update={"train": plain.train.model_copy(update={"max_tokens": 3000})})
    assert sized(explicit) == (explicit, None)
