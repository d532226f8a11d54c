"""Devices that this machine computes on; no other module asks for them.

The installer imports this module under the system's Python, without torch.
"""

import os
import shutil
import subprocess
from pathlib import Path


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA GPU is usable: its device file exists, or nvidia-smi runs (as under WSL)."""
    if Path("/dev/nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def computes_on_gpu() -> bool:
    """Return whether torch can compute on a GPU: the machine has one, and torch is built for it."""
    import torch

    return torch.cuda.is_available()


def compute_device() -> str:
    """Return torch's name of the device for a model that has no rank of its own: `cuda` or `cpu`."""
    return "cuda" if computes_on_gpu() else "cpu"


def gpu_name() -> str:
    """Return the GPU's product name."""
    import torch

    return torch.cuda.get_device_name()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the GPUs that torch can compute on, as CUDA_VISIBLE_DEVICES names them; empty on a CPU.

    Nothing is allocated on them. If the operator has set the variable, these are its entries: numbers or UUIDs. Of
    parts of GPUs (MIG) a process can use one, and its children one each.
    """
    from pipeline.runtime.dtypes import cpu_build

    if cpu_build() or not computes_on_gpu():
        return []
    import torch

    return named_gpus(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def named_gpus(number: int, visible: str | None) -> list[str]:
    """Return the names of this many visible GPUs, given the value of CUDA_VISIBLE_DEVICES."""
    if visible is None:
        return [str(index) for index in range(number)]
    names = [name.strip() for name in visible.split(",")]
    parts = [name for name in names if name.startswith("MIG-")]
    return parts if len(parts) == len(names) else names[:number]
