"""The Triton kernels of `token_marginal`, on the GPU, or under Triton's interpreter where there is none."""

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
def test_the_kernels_equal_their_twins() -> None:
    # In a process of its own: Triton chooses the interpreter when it is imported, and torch or vLLM may have done that.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("kernel_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", str(cases)],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


COMPILE = """
import re

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from stage2_student.interfaces.token_marginal import kernel_triton

DOUBLES = {"mass_I", "end_R", "logprob_R2", "log_total_R", "grad_mass_I", "grad_end_R", "grad_logprob_R2"}
OTHERS = {"logits": "bf16", "gradient": "bf16", "matrix": "fp32", "taken": "bf16", "tokens_R2": "i64"}
OTHERS |= {"unique_Q": "i64", "common_C": "i16", "symbol_J": "i16", "is_complete_I": "u8"}
OTHERS |= {"largest_I": "fp32", "coefficient_I": "fp32"} | dict.fromkeys(DOUBLES, "fp64")
CONSTANTS = {"work": tl.float32, "floor": -80.0, "least": kernel_triton.LEAST, "tile": kernel_triton.TILE}
CONSTANTS |= {"cells": kernel_triton.CELLS, "block": 64, "symbols": 256}
CASES = [(kernel_triton._sum_rows, True, 90), (kernel_triton._sum_rows, False, 80)]
CASES += [(kernel_triton._spread_rows, True, 90), (kernel_triton._spread_rows, False, 80)]
CASES += [(kernel_triton._list_cells, True, 80), (kernel_triton._take_rows, True, 80)]
for kernel, in_order, architecture in CASES:
    kinds, constants = {}, CONSTANTS | {"in_order": in_order}
    if in_order:  # Triton makes a constant of a number that is 1
        constants |= {"num_end": 1, "num_unique": 1, "max_nodes": 1}
    for name in kernel.arg_names:
        is_pointer = name in OTHERS or re.search(r"_[A-Z]2?$", name)
        kinds[name] = "constexpr" if name in constants else f"*{OTHERS.get(name, 'i32')}" if is_pointer else "i32"
    fixed = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    assert compile(ASTSource(kernel, kinds, fixed), target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
"""


@needs_triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
