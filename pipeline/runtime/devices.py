"""What this machine computes on. The installer asks it too, with the system's Python: standard library only."""

import shutil
import subprocess
from pathlib import Path


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU is usable: its device file is there, or nvidia-smi runs (as under WSL)."""
    if Path("/dev/nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0
