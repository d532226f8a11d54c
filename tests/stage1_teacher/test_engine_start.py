"""An engine that cannot start with a model."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.tokenizer_bytes import ByteTokenizer
from stage1_teacher import teacher


def test_an_engine_that_does_not_start_is_refused_with_the_models_name_and_another_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_engine(*_: Any) -> None:
        raise AttributeError("'LlamaConfig' object has no attribute 'score_func'\nand more")

    monkeypatch.setattr(teacher, "open_engine", open_engine)
    values = {
        "corpus": {"source": "unused.jsonl"},
        "teacher": {"model": str(model), "engine": "vllm", "dtype": "float32"},
        "dump": {"path": str(tmp_path)},
    }
    said = r"model \(LlamaForCausalLM\): vllm does not start with it \(AttributeError: .* 'score_func'\).*teacher\.engine: transformers"
    with pytest.raises(ValueError, match=said):
        teacher.open_teacher(Recipe.model_validate(values), str(model), ByteTokenizer.load(str(model)))
