"""The attention that a recipe names is the one that computes, or is refused before weights are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import plan
from pipeline.runtime.model_source import ModelSource
from pipeline.tokenization.byte_tokenizer import ByteTokenizer
from pipeline.tokenization.special_ids import SpecialIds
from stage2_student.acceleration import attention, requirements
from stage2_student.launch.launch import checked, launch_student
from stage2_student.runs.identity import _PLACEMENT
from stage2_student.training.building.student import build_student
from tests.support.small_dumps import make_recipe
from tests.support.tiny import tiny_model
from tests.zoo.models import tiny_model as zoo_model

END_ID = 268
FLASH = {f"flash_attention_{version}": name for version, name in ((2, "flash-attn"), (3, "flash-attn-3"))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


def config(**train: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dtype": "bfloat16", **train})


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_named_attention_computes_the_same_states(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "start").symlink_to(model)
    tokenizer, ids = ByteTokenizer.load(str(model)), SpecialIds(END_ID, (END_ID,))
    tokens_BL = torch.arange(24).reshape(2, 12)
    found = {}
    for wanted in ("auto", name):
        recipe = make_recipe(tmp_path, model, tmp_path, {"attention": wanted})
        lm = build_student(recipe, tokenizer, ids).lm
        found[wanted] = lm(input_ids=tokens_BL).logits
        assert wanted == "auto" or lm.config._attn_implementation == name
    torch.testing.assert_close(found[name], found["auto"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "package"), FLASH.items())
def test_a_kernel_whose_package_is_missing_is_refused_by_a_plan_and_a_dry_run(
    name: str, package: str, model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, model, tmp_path / "run", {"attention": name})
    said = rf"train\.attention: {name} needs the package {package}, .*`pip install {package}.*set train\.attention=sdpa"
    for start in (checked, lambda one: launch_student(one, dry_run=True)):
        with pytest.raises(ValueError, match=said):
            start(recipe)
    assert not (tmp_path / "run").exists()


def test_a_kernel_of_gpus_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.metadata, "distribution", lambda name: name)
    for name in (*FLASH, "flex_attention"):
        with pytest.raises(ValueError, match=rf"train\.attention: {name} needs an NVIDIA GPU, and torch sees none"):
            attention.check_attention(config(attention=name))
    monkeypatch.setattr(attention, "require_gpu", lambda *_: None)
    attention.check_attention(config(attention="flash_attention_2"))
    with pytest.raises(ValueError, match=r"computes in bfloat16 or float16, and train\.dtype is float32"):
        attention.check_attention(config(attention="flash_attention_2", dtype="float32"))


def test_a_family_without_it_is_refused_from_its_config_alone(tmp_path: Path) -> None:
    zoo_model("gpt_oss", 300).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"train\.attention: sdpa cannot be used for a model of type gpt_oss.*=auto"):
        attention.check_model_has(config(attention="sdpa"), ModelSource(str(tmp_path), None, False))
    attention.check_model_has(config(attention="eager"), ModelSource(str(tmp_path), None, False))


def test_one_that_transformers_would_replace_in_silence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = zoo_model("llama", 300)
    monkeypatch.setattr(type(lm), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ValueError, match=r"cannot be used for a model of type llama, which would compute with sdpa"):
        attention.use_attention(lm, config(attention="eager"))


def test_flash_attention_is_asked_of_transformers_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here transformers refuses it; what it says comes with the way out."""
    with pytest.raises(ValueError, match=r"flash_attention_2 cannot be used for .* llama: .*Set train\.attention"):
        attention.use_attention(zoo_model("llama", 300), config(attention="flash_attention_2"))
    lm = zoo_model("llama", 300)
    asked: list[str] = []

    def set_name(name: str) -> None:
        asked.append(name)
        lm.config._attn_implementation_internal = name

    monkeypatch.setattr(lm, "set_attn_implementation", set_name)
    attention.use_attention(lm, config(attention="flash_attention_2"))
    assert asked == ["flash_attention_2"]


def test_packed_rows_are_refused_where_they_cannot_be_tested() -> None:
    with pytest.raises(ValueError, match=r"train\.packing is on, but .*train\.attention: flash_attention_2"):
        config(attention="flash_attention_2", packing="on")


def test_a_plan_names_the_attention_and_a_run_may_change_it() -> None:
    assert dict(plan(load_recipe("demo", ["train.attention=sdpa"])))["train.attention"] == "sdpa"
    assert "train.attention" not in dict(plan(load_recipe("demo"))) and "attention" in _PLACEMENT
