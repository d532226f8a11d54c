"""Which version this is."""

import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path


def version_text() -> str:
    """`bld 0.1.0`, with the git revision where the package lies in a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        text = f"bld {package_version('byte-level-distillation')}"
    except PackageNotFoundError:
        text = "bld, not installed: run from its folder"
    if not (root / ".git").exists():
        return text
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git itself is not installed
        return text
    return f"{text} ({found.stdout.strip()})" if found.returncode == 0 else text
