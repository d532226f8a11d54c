"""Devices that this machine computes on; no other module asks for them.

The installer imports this module under the system's Python, without torch.
"""

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
