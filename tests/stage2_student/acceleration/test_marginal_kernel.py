"""The kernel of `token_marginal`: which one a run has, what says so, and what is refused."""

from typing import Any

import pytest

from pipeline.config import StudentConfig, TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.planning.dry_run import plan
from stage2_student.acceleration import marginal_kernel, requirements
from stage2_student.interfaces import StudentShape, make_interface
from stage2_student.interfaces.token_marginal.interface import TokenMarginal

SHAPE = StudentShape(8, 1000, (b"a", b"b", b"ab", None), b"", (3,))


def train(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dtype": "bfloat16", **values})


def student(interface: str = "token_marginal") -> StudentConfig:
    return StudentConfig(model="m", path="p", interface=interface)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (marginal_kernel, requirements):
        monkeypatch.setattr(module, "computes_on_gpu", lambda: True)


def used(config: TrainConfig) -> tuple[TokenMarginal, str]:
    interface = make_interface(student(), SHAPE)
    assert isinstance(interface, TokenMarginal)
    said = marginal_kernel.use_marginal_kernel(interface, config)
    assert said is not None
    return interface, said


def test_a_cpu_has_its_compiled_kernel_whatever_is_said() -> None:
    for name in ("auto", "torch"):
        interface, said = used(train(marginal_kernel=name))
        assert interface.by_nodes is None and said.endswith("the kernel that is compiled for a CPU")


def test_a_gpu_has_triton_or_what_is_asked_for(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    interface, said = used(train(marginal_kept_gib=1.0))
    assert interface.by_nodes is not None and "Triton" in said
    memory = interface.by_nodes[1]
    assert memory.kept_rows == 2**30 // 2000 and memory.chunk_rows == 2**29 // 2000
    interface, said = used(train(marginal_kernel="torch"))
    assert interface.by_nodes is None and said == "token_marginal is computed by torch's own operations"
    several = used(train(balance="gradient"))[0].by_nodes
    assert several is not None and several[1].kept_rows == 0
    monkeypatch.setattr(marginal_kernel, "find_spec", lambda name: None)
    interface, said = used(train())
    assert interface.by_nodes is None and said.endswith("own operations, because triton is not installed")


def test_other_interfaces_have_none() -> None:
    assert marginal_kernel.use_marginal_kernel(None, train()) is None
    assert marginal_kernel.use_marginal_kernel(make_interface(student("linear"), SHAPE), train()) is None


def test_a_missing_package_or_gpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise requirements.metadata.PackageNotFoundError(name)

    asked = train(marginal_kernel="triton")
    monkeypatch.setattr(requirements.metadata, "distribution", absent)
    with pytest.raises(ValueError, match=r"marginal_kernel: triton needs the package triton, .*`pip install triton`"):
        marginal_kernel.check_marginal_kernel(asked, student())
    monkeypatch.setattr(requirements.metadata, "distribution", lambda name: name)
    monkeypatch.setattr(requirements, "computes_on_gpu", lambda: False)
    with pytest.raises(ValueError, match=r"triton needs an NVIDIA GPU, .* set train\.marginal_kernel=auto"):
        marginal_kernel.check_marginal_kernel(asked, student())
    marginal_kernel.check_marginal_kernel(train(), student("linear"))


@pytest.mark.parametrize(
    ("interface", "objectives", "said"),
    [
        ("causal", {}, r"and student\.interface is causal: set train\.marginal_kernel=auto"),
        ("token_marginal", {"ce": 1.0, "kl": 0.0}, r"and no objective of train\.objectives uses bytes"),
    ],
)
def test_it_is_refused_where_nothing_would_use_it(
    interface: str, objectives: dict[str, float], said: str, gpu: None
) -> None:
    asked = train(marginal_kernel="triton", objectives=objectives)
    with pytest.raises(ValueError, match=said):
        marginal_kernel.check_marginal_kernel(asked, student(interface))


def test_a_plan_says_which() -> None:
    def line(*overrides: str) -> str | None:
        return dict(plan(load_recipe("demo", list(overrides)))).get("train.marginal_kernel")

    assert line() == ("auto: on a GPU Triton if it is installed, keeping 2 GiB of logits; a compiled kernel on a CPU")
    assert line("train.marginal_kernel=torch") == "torch: on a GPU torch's own operations; a compiled kernel on a CPU"
    triton = line("train.marginal_kernel=triton", "train.marginal_kept_gib=0.5")
    assert triton == "triton: on a GPU Triton, keeping 0.5 GiB of logits"
    assert line("student.interface=linear") is None
