"""The GPU's row reduction, on the GPU, or under Triton's interpreter where there is none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: its kernels cannot even be interpreted"
)


@needs_triton
def test_the_kernels_equal_the_slow_twin() -> None:
    # In a process of its own: Triton chooses the interpreter when it is imported, and torch or vLLM may have done that.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_kernel_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", str(cases)],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from stage1_teacher.reduction import triton_kernel

constants = {"floor": -80.0, "tile": triton_kernel.TILE, "block": triton_kernel.BLOCK}
constants |= {"ranges": triton_kernel.RANGES, "blocks_at_once": triton_kernel.BLOCKS_AT_ONCE}
for kernel in (triton_kernel._stream_rows, triton_kernel._sum_ranges):
    kinds = {}
    for name in kernel.arg_names:
        is_pointer = name.rsplit("_")[-1] in {"RV", "C", "RB", "RT", "R", "J"}
        pointer = "*i32" if name in INDICES else "*fp32"
        kinds[name] = "constexpr" if name in constants else pointer if is_pointer else "i32"
    fixed = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    for architecture in (80, 90):
        assert compile(ASTSource(kernel, kinds, fixed), target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
"""


@needs_triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    code = 'INDICES = {"order_C", "row_J", "first_J", "last_J"}\n' + COMPILE
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
