"""Liger's fused cross-entropy is asked as its documentation has it, and gives the loss that it stands for.

The kernel needs a GPU: here one of its signature is put in its place, written in plain torch.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.config import TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import plan
from stage2_student.acceleration import requirements
from stage2_student.acceleration.fused_ce import check_fused_ce, fused_label_nats
from stage2_student.data.examples import NO_LABEL
from stage2_student.data.micro_batch import MicroBatch, empty_micro_batch
from stage2_student.model.initial_student import load_start
from stage2_student.model.student import Student
from tests.support.tiny import tiny_model

ONLY_CE = {"ce": 2.0, "byte_ce": 0.0, "kl": 0.0}


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The signature of liger-kernel 0.8, of what is used here."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert reduction == "sum" and accum_dtype == torch.float32
        self.softcap = softcap

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        assert len(_input) and (target != -100).all()
        logits = nn.functional.linear(_input, lin_weight, bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return cross_entropy(logits, target, reduction="sum")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


def config(**train: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dtype": "float32", "fused_ce": "liger", "objectives": ONLY_CE, **train})


def micro_batch() -> MicroBatch:
    from dataclasses import replace

    tokens_BL = torch.arange(24).reshape(2, 12)
    labels_BL = torch.where(tokens_BL % 5 == 0, NO_LABEL, tokens_BL + 1)
    return replace(empty_micro_batch(1), tokens_BL=tokens_BL, labels_BL=labels_BL)


def test_a_student_has_the_loss_and_the_gradient_that_it_has_without(kernel: None, model: Path) -> None:
    found = []
    for fused in ("none", "liger"):
        student = Student(load_start(model, False), None, config(fused_ce=fused))
        nats, sums = student(micro_batch())
        nats.backward()
        grads = [weight.grad for weight in student.parameters()]
        assert student.sums_names == ("ce",) and all(grad is not None for grad in grads)
        found.append((nats.detach(), sums, *grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_rank_where_nothing_is_supervised_gives_the_head_a_gradient_of_zero(kernel: None, model: Path) -> None:
    student = Student(load_start(model, False), None, config())
    nats, _ = student(empty_micro_batch(1))
    nats.backward()
    grad = student.lm.get_output_embeddings().weight.grad
    assert nats.item() == 0 and grad is not None and not grad.any()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0)])
def test_scaled_and_capped_logits_are_those_of_the_family(
    with_bias: bool, scale: float, softcap: float | None, kernel: None
) -> None:
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(6, 11, bias=with_bias), 3 * torch.randn(5, 6), torch.randint(11, (5,))
    logits = head(hidden).double() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nats = fused_label_nats(hidden, labels, head, scale, softcap)
    assert nats.shape == (1,)
    torch.testing.assert_close(nats[0].double(), cross_entropy(logits, labels, reduction="sum"))


def test_a_missing_package_or_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise requirements.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.metadata, "distribution", absent)
    with pytest.raises(ValueError, match=r"fused_ce: liger needs the package liger-kernel, .*`pip install liger"):
        check_fused_ce(config())
    monkeypatch.setattr(requirements.metadata, "distribution", lambda name: name)
    with pytest.raises(ValueError, match=r"fused_ce: liger needs an NVIDIA GPU, .* set train\.fused_ce=none"):
        check_fused_ce(config())
    check_fused_ce(config(fused_ce="none"))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"objectives": {**ONLY_CE, "kl": 1.0}}, r"only objective is ce, and there is kl"),
        ({"objectives": {**ONLY_CE, "byte_ce": 1.0, "alm": 1.0}}, r"and there are byte_ce, alm"),
        ({"deepspeed": {"zero_stage": 3}}, r"zero_stage 3 partitions"),
        ({"balance": "gradient"}, r"set train\.balance=none"),
    ],
)
def test_other_objectives_and_partitioned_heads_are_refused(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**train)


def test_a_plan_names_it() -> None:
    overrides = ["train.fused_ce=liger", "train.objectives={ce: 1, kl: 0}"]
    assert dict(plan(load_recipe("demo", overrides)))["train.fused_ce"] == "liger"
