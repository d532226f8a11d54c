import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import StudentConfig, TeacherConfig
from pipeline.runtime.huggingface import load_config, load_model, load_tokenizer
from pipeline.runtime.model_source import ModelSource, as_source
from tests.support.tiny import tiny_model


def test_code_of_a_mere_folder_is_not_trusted() -> None:
    assert as_source("org/model") == ModelSource("org/model", None, False)
    assert as_source(ModelSource("org/model", "abc", True)) == ModelSource("org/model", "abc", True)


def test_what_a_recipe_says_of_a_model_stays_with_it_when_it_is_found_elsewhere() -> None:
    teacher = TeacherConfig(model="org/model", revision="abc", trust_remote_code=True)
    student = StudentConfig(model="org/model", path="run", revision="abc", trust_remote_code=True)
    assert teacher.source == student.source == ModelSource("org/model", "abc", True)
    assert teacher.source.at("/cache/model") == ModelSource("/cache/model", "abc", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        teacher.source.revision = "main"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("load", "loader"),
    [
        (load_config, "AutoConfig"),
        (load_tokenizer, "AutoTokenizer"),
        (lambda source: load_model(source, "auto"), "AutoModelForCausalLM"),
    ],
)
def test_transformers_is_told_all_that_a_source_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, loader: str
) -> None:
    told: list[dict[str, Any]] = []

    def from_pretrained(source: str, **options: Any) -> Any:
        told.append({"source": source, **options})
        return original(source, **options)

    import transformers

    original = getattr(transformers, loader).from_pretrained
    monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", from_pretrained)
    model = tiny_model(tmp_path / "model")
    load(ModelSource(str(model), "abc", True))
    load(str(model))
    said = [(call["source"], call["revision"], call["trust_remote_code"]) for call in told]
    assert said == [(str(model), "abc", True), (str(model), None, False)]
