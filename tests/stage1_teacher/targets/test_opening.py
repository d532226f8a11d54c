"""Engines that cannot start with a model."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from stage1_teacher.engines.base import EngineRequest
from stage1_teacher.targets import opening

SAYS = {
    "AttributeError": "raise AttributeError(\"'LlamaConfig' object has no attribute 'score_func'\\nand more\")",
    "ValueError": "raise ValueError('Head dimension 24 is not supported by MLA.')",
}


def opened(model: Path, folder: Path, branches: bool = False, beam_width: int = 0) -> None:
    values = {
        "corpus": {"source": "unused.jsonl"},
        "teacher": {"model": str(model), "engine": "vllm", "dtype": "float32"},
        "dump": {"path": str(folder), "covering": {"beam_width": beam_width}},
    }
    opening.open_teacher(Recipe.model_validate(values), str(model), ByteTokenizer.load(str(model)), branches=branches)


@pytest.mark.parametrize("kind", SAYS)
def test_an_engine_that_does_not_start_is_refused_with_the_models_name_and_another_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    foreign = {"__name__": "vllm.some.module"}
    exec(f"def open_engine(*_):\n    {SAYS[kind]}", foreign)
    monkeypatch.setattr(opening, "open_engine", foreign["open_engine"])
    said = (
        rf"model \(LlamaForCausalLM\): vllm does not start with it \({kind}: [^\n]*\)\..*teacher\.engine: transformers"
    )
    with pytest.raises(ValueError, match=said):
        opened(model, tmp_path)


def test_a_quantized_head_that_cannot_be_float32_is_refused_with_the_key_to_set(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {"__name__": "vllm.model_executor.layers.logits_processor"}
    said = "A head_dtype different from the model dtype is only supported for an unquantized lm_head."
    exec(f"def open_engine(*_):\n    raise ValueError({said!r})", foreign)
    monkeypatch.setattr(opening, "open_engine", foreign["open_engine"])
    with pytest.raises(ValueError, match=r"Its head is quantized: set teacher\.head_dtype: model\."):
        opened(model, tmp_path)


def test_what_we_refuse_ourselves_keeps_its_words(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Any] = {"__name__": "stage1_teacher.engines.vllm"}
    exec("def open_engine(*_):\n    raise ValueError('placement.x is 2')", own)
    monkeypatch.setattr(opening, "open_engine", own["open_engine"])
    with pytest.raises(ValueError, match=r"^placement\.x is 2$"):
        opened(model, tmp_path)


def test_an_audit_changes_nothing_in_how_the_engine_is_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to switch on vLLM's prefix cache and, on a CPU, to force a block size, for the whole dump."""
    asked: list[EngineRequest] = []

    def open_engine(request: EngineRequest) -> None:
        asked.append(request)
        raise OSError

    monkeypatch.setattr(opening, "open_engine", open_engine)
    for branches, beam_width in ((False, 0), (True, 0), (True, 4)):
        with pytest.raises(OSError):
            opened(model, tmp_path, branches, beam_width)
    alone, audited, branched = (request._replace(tokenizer=asked[0].tokenizer) for request in asked)
    assert alone == audited and not alone.branches
    assert branched == alone._replace(branches=True)
