"""What this machine computes on; nothing else asks. The installer does so too, with the system's Python: without
torch.
"""

import shutil
import subprocess
from pathlib import Path


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU is usable: its device file is there, or nvidia-smi runs (as under WSL)."""
    if Path("/dev/nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def computes_on_gpu() -> bool:
    """Return whether torch has a GPU to compute on: one is there, and this is a build for it."""
    import torch

    return torch.cuda.is_available()


def compute_device() -> str:
    """Return torch's name of the device that a model without a rank of its own computes on: `cuda` or `cpu`."""
    return "cuda" if computes_on_gpu() else "cpu"


def gpu_name() -> str:
    """Return what the GPU's maker calls it."""
    import torch

    return torch.cuda.get_device_name()
