"""The kernel of the interface `token_marginal`: compiled for a CPU, on a GPU Triton's or torch's own operations."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pipeline.config import StudentConfig, TrainConfig
from pipeline.runtime.devices import computes_on_gpu
from stage2_student.acceleration.requirements import require_gpu, require_package

if TYPE_CHECKING:  # the launcher checks options without torch
    from stage2_student.interfaces import Interface

_KEY, _OTHERWISE = "train.marginal_kernel: triton", "train.marginal_kernel=auto"
_CHUNK_BYTES = 2**29  # of logits that are computed again, held at once
_SAID = {
    "triton": "one Triton kernel forward and one backward",
    "torch": "torch's own operations",
    "compiled": "the kernel that is compiled for a CPU",
}


def check_marginal_kernel(train: TrainConfig, student: StudentConfig) -> None:
    """Raise ValueError if this machine lacks the package or the GPU of `train.marginal_kernel`, or no kernel runs."""
    if train.marginal_kernel != "triton":
        return
    if student.interface != "token_marginal" or not train.objectives.uses_bytes:
        why = (
            f"student.interface is {student.interface}"
            if student.interface != "token_marginal"
            else "no objective of train.objectives uses bytes"
        )
        raise ValueError(f"{_KEY} is a kernel of the interface token_marginal, and {why}: set {_OTHERWISE}")
    require_package(_KEY, "triton", "pip install triton", _OTHERWISE)
    require_gpu(_KEY, _OTHERWISE)


def marginal_kernel(train: TrainConfig) -> Literal["triton", "torch", "compiled"]:
    """Return which kernel computes `token_marginal` on this machine."""
    if not computes_on_gpu():
        return "compiled"
    if train.marginal_kernel != "auto":
        return train.marginal_kernel
    return "torch" if find_spec("triton") is None else "triton"


def use_marginal_kernel(interface: "Interface | None", train: TrainConfig) -> str | None:
    """Have an interface compute by the kernel of this machine; returns a sentence on which it is, None for others.

    It has to be told before it prepares a micro-batch.
    """
    from stage2_student.interfaces.token_marginal.interface import TokenMarginal

    if not isinstance(interface, TokenMarginal):
        return None
    name = marginal_kernel(train)
    if name == "triton":
        from stage2_student.interfaces.token_marginal.node_sums import Memory

        kernels = import_module("stage2_student.interfaces.token_marginal.kernel_triton").KERNELS
        row_bytes = len(interface.token_C) * (4 if train.dtype == "float32" else 2)
        # Gradients of single objectives are several, and each is written over the logits.
        kept = 0 if train.balance == "gradient" else int(train.marginal_kept_gib * 2**30) // row_bytes
        interface.use_nodes(kernels, Memory(kept, max(_CHUNK_BYTES // row_bytes, 1)))
    lacks = name == "torch" and train.marginal_kernel == "auto"
    return f"token_marginal is computed by {_SAID[name]}" + (", because triton is not installed" if lacks else "")
