"""8-bit AdamW is asked of bitsandbytes as its documentation has it, and refused at once where that is not there.

Where bitsandbytes is installed, it also trains: the weights after some steps are those of AdamW, nearly.
"""

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import plan
from stage2_student.acceleration import requirements
from stage2_student.acceleration.eight_bit import EPS, check_can_convert, check_optimizer, make_optimizer
from stage2_student.distributed.deepspeed_config import deepspeed_config

IS_INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


def config(**train: Any) -> TrainConfig:
    return TrainConfig.model_validate({"optimizer": "adamw_8bit", "lr": 0.01, "weight_decay": 0.1, **train})


class AdamW8bit(torch.optim.AdamW):
    """The signature of bitsandbytes 0.50, and AdamW's arithmetic."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)


def test_a_missing_package_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise requirements.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.metadata, "distribution", absent)
    with pytest.raises(
        ValueError,
        match=r"train\.optimizer: adamw_8bit needs the package bitsandbytes, .* `pip install bitsandbytes` .*=adamw",
    ):
        check_optimizer(config())
    check_optimizer(config(optimizer="adamw"))


def test_groups_go_to_the_package_with_their_rates_and_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(AdamW8bit=AdamW8bit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    train = config(betas=(0.8, 0.9))
    make = make_optimizer(train)
    assert make is not None and make_optimizer(config(optimizer="adamw")) is None
    groups = [{"params": [nn.Parameter(torch.ones(3))], "weight_decay": decay} for decay in (0.1, 0.0)]
    made = make(groups)
    values = {"lr": 0.01, "betas": (0.8, 0.9), "eps": EPS}
    assert all(values.items() <= group.items() for group in made.param_groups)
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


def test_deepspeed_makes_no_optimizer_of_its_own_beside_it() -> None:
    assert "optimizer" not in deepspeed_config(load_recipe("demo", ["train.optimizer=adamw_8bit"]), 1)
    assert deepspeed_config(load_recipe("demo"), 1)["optimizer"]["params"]["eps"] == EPS


def test_what_it_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"train\.optimizer: adamw_8bit keeps .*offload_optimizer is cpu"):
        config(deepspeed={"zero_stage": 2, "offload_optimizer": "cpu"})
    with pytest.raises(ValueError, match=r"written by 2 ranks, and there are 4 now; .*train\.num_processes=2"):
        check_can_convert(config(), 2, 4)
    check_can_convert(config(optimizer="adamw"), 2, 4)


def test_a_plan_names_it() -> None:
    assert dict(plan(load_recipe("demo", ["train.optimizer=adamw_8bit"])))["train.optimizer"].startswith("adamw_8bit:")


@pytest.mark.skipif(not IS_INSTALLED, reason="bitsandbytes is not installed")
def test_the_package_takes_these_steps_the_way_of_adamw_with_moments_of_a_byte() -> None:
    real = importlib.import_module("bitsandbytes").optim.AdamW8bit
    assert inspect.signature(real).parameters.keys() == inspect.signature(AdamW8bit).parameters.keys()
    make = make_optimizer(config())
    assert make is not None
    torch.manual_seed(0)
    goal = torch.randn(64, 128)
    found, moments = [], []
    for kind in (make, lambda groups: torch.optim.AdamW(groups, 0.01, (0.9, 0.95), EPS, 0.1)):
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = kind([{"params": [weight], "weight_decay": 0.1}])
        for _ in range(20):
            optimizer.zero_grad()
            (weight - goal).square().sum().backward()
            optimizer.step()
        found.append(weight.detach())
        moments.append(
            {value.dtype for value in optimizer.state[weight].values() if getattr(value, "shape", None) == goal.shape}
        )
    assert moments == [{torch.uint8}, {torch.float32}]
    assert float(torch.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0)) > 0.99
