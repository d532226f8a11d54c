"""Layers beside adapters in 4 bits: asked of bitsandbytes as its documentation has it, and exported as they trained.

Where bitsandbytes is not installed, one of its signatures is in its place, which rounds to multiples of 1/8.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Recipe, StudentConfig
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import plan
from stage2_student.acceleration import requirements
from stage2_student.acceleration.four_bit import check_base, quantize_base, round_base
from stage2_student.model.initial_student import load_start
from stage2_student.model.lora import add_adapters
from tests.support.small_dumps import make_recipe
from tests.support.tiny import tiny_model
from tests.zoo.models import tiny_model as zoo_model

IS_INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


class Params4bit(nn.Parameter):
    """Weights to be rounded; what `Linear4bit.weight` is, in bitsandbytes 0.50."""

    def __new__(
        cls,
        data: Tensor,
        requires_grad: bool = False,
        quant_state: object = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: object = None,
    ) -> "Params4bit":
        assert not requires_grad and compress_statistics and quant_type == "nf4" and module is not None
        return super().__new__(cls, data, False)


class Linear4bit(nn.Linear):
    """A layer that rounds its weight when it is moved."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
    ) -> None:
        assert compute_dtype == torch.float32 and compress_statistics and quant_type == "nf4"
        super().__init__(input_features, output_features, bias)

    def to(self, device: torch.device) -> "Linear4bit":  # type: ignore[override]
        assert isinstance(self.weight, Params4bit)
        self.weight.data = dequantize_4bit(*quantize_4bit(self.weight.data, compress_statistics=True, quant_type="nf4"))
        return self


def quantize_4bit(A: Tensor, compress_statistics: bool, quant_type: str) -> tuple[Tensor, object]:
    assert compress_statistics and quant_type == "nf4"
    return A.mul(8).round(), "state"


def dequantize_4bit(A: Tensor, quant_state: object) -> Tensor:
    assert quant_state == "state"
    return A / 8


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.skipif(not IS_INSTALLED, reason="absent"))])
def use_package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what puts the stand-in in place; after adapters are made, because peft looks for the package too."""

    def use() -> None:
        fake = ModuleType("bitsandbytes")
        fake.nn = SimpleNamespace(Linear4bit=Linear4bit, Params4bit=Params4bit)  # type: ignore[attr-defined]
        fake.functional = SimpleNamespace(  # type: ignore[attr-defined]
            quantize_4bit=quantize_4bit, dequantize_4bit=dequantize_4bit
        )
        monkeypatch.setitem(sys.modules, "bitsandbytes", fake)

    return use if request.param == "stand-in" else lambda: None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    work = tmp_path_factory.mktemp("work")
    tiny_model(work / "model")
    return make_recipe(work / "dump", work / "model", work / "run", {}, lora_rank=4, lora_base="4bit")


def adapted(recipe: Recipe) -> tuple[Any, Any]:
    """Return a model with adapters that change it, and peft's view of it."""
    student = recipe.student
    assert student is not None
    lm = load_start(Path(student.model), False).train()
    torch.manual_seed(0)
    view = add_adapters(lm, student, tokenizer_moved=False)
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return lm, view


def test_what_is_exported_computes_what_was_trained(use_package: Callable[[], None], recipe: Recipe) -> None:
    assert recipe.student is not None
    tokens_BL = torch.tensor([[5, 3, 77, 200, 41]])
    (trained, _), (exported, view) = adapted(recipe), adapted(recipe)
    use_package()
    plain = trained(input_ids=tokens_BL).logits
    quantize_base(trained, recipe.student, recipe.train, torch.device("cpu"))
    logits = trained(input_ids=tokens_BL).logits
    assert (logits - plain).abs().max() > 1e-3 * plain.abs().max()  # 4 bits do change it
    round_base(exported, recipe.student)
    torch.testing.assert_close(view.merge_and_unload()(input_ids=tokens_BL).logits, logits, rtol=1e-3, atol=1e-3)


def test_adapters_learn_beside_it_and_nothing_else_does(use_package: Callable[[], None], recipe: Recipe) -> None:
    assert recipe.student is not None
    lm, _ = adapted(recipe)
    use_package()
    quantize_base(lm, recipe.student, recipe.train, torch.device("cpu"))
    lm(input_ids=torch.tensor([[5, 3, 77]])).logits.square().sum().backward()
    learnt = {name for name, weight in lm.named_parameters() if weight.grad is not None}
    assert learnt and learnt == {name for name, _ in lm.named_parameters() if "lora_" in name}


def test_what_it_cannot_do_is_refused_by_name(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise requirements.metadata.PackageNotFoundError(name)

    student, stage_3 = recipe.student, {"deepspeed": {"zero_stage": 3}}
    assert student is not None
    monkeypatch.setattr(requirements.metadata, "distribution", absent)
    with pytest.raises(ValueError, match=r"student\.lora_base: 4bit needs the package bitsandbytes, .*lora_base=full"):
        check_base(student, recipe.train)
    monkeypatch.setattr(requirements.metadata, "distribution", lambda name: name)
    with pytest.raises(ValueError, match=r"zero_stage 3 would partition: give zero_stage 2 or less"):
        check_base(student, type(recipe.train).model_validate(stage_3))
    with pytest.raises(ValueError, match=r"4 bits learn nothing without adapters: give student\.lora_rank"):
        StudentConfig(model="m", path="p", lora_base="4bit")
    lm = zoo_model("gpt2", 300)
    add_adapters(lm, student, tokenizer_moved=False)
    with pytest.raises(ValueError, match=r"adapters of this gpt2 are beside Conv1D: set student\.lora_base=full"):
        quantize_base(lm, student, recipe.train, torch.device("cpu"))


def test_a_plan_says_it() -> None:
    lines = dict(plan(load_recipe("demo", ["student.lora_rank=4", "student.lora_base=4bit"])))
    assert "LoRA of rank 4 beside layers of 4 bits" in lines["student"]
