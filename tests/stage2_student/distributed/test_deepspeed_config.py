"""DeepSpeed's configuration: what the recipe gives, and what an operator's JSON may add."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import DeepSpeedConfig
from stage2_student.distributed.deepspeed_config import deepspeed_config
from tests.support.small_dumps import recipe_in


def deepspeed(tmp_path: Path, given: Any = None, **values: Any) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a recipe with this operator's JSON."""
    if given is not None:
        (tmp_path / "own.json").write_text(given if isinstance(given, str) else json.dumps(given))
        values["config"] = str(tmp_path / "own.json")
    return deepspeed_config(recipe_in(tmp_path, grad_clip=0.5, deepspeed=values), 4)


def test_the_derived_json_says_stage_offload_and_clipping(tmp_path: Path) -> None:
    derived = deepspeed(tmp_path, zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert derived["gradient_clipping"] == 0.5 and derived["train_batch_size"] == 4
    zero = derived["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in deepspeed(tmp_path)["zero_optimization"]


def test_an_operators_json_is_merged_over_the_derived_one(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"overlap_comm": True},
        "optimizer": {"params": {"torch_adam": False}},
        "comms_logger": {"enabled": True},
    }
    merged = deepspeed(tmp_path, own, zero_stage=2)
    assert merged["zero_optimization"] == {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}
    assert merged["optimizer"]["params"]["torch_adam"] is False and merged["optimizer"]["params"]["lr"] == 1e-3
    assert merged["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 8}, "sets train_batch_size, .* set train.batch_tokens instead"),
        ({"gradient_accumulation_steps": 2}, "set train.batch_tokens and train.micro_batch_tokens"),
        ({"zero_optimization": {"stage": 3}}, "sets zero_optimization.stage, .* set train.deepspeed.zero_stage"),
        ({"optimizer": {"params": {"lr": 1}}}, "set train.lr"),
        ({"fp16": {"enabled": True}}, "set train.dtype"),
        ({"scheduler": {}}, "set train.warmup_steps and"),
        ({"checkpoint": {"load_universal": True}}, "sets checkpoint, which cannot be set"),
        ([1], "must hold an object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_an_operators_json_may_not_say_what_the_recipe_says(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        deepspeed(tmp_path, given)


def test_offload_without_its_stage_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"offload_parameters: cpu needs .*zero_stage 3 or more, not 2"):
        DeepSpeedConfig(zero_stage=2, offload_parameters="cpu")
    with pytest.raises(ValidationError, match="offload_optimizer: cpu needs"):
        DeepSpeedConfig(offload_optimizer="cpu")
