"""How a wheel comes to know the revision that it was built from. Only the build of a wheel imports this
(pyproject.toml).
"""

import subprocess
import sys
from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the packages, then writes the revision beside them. An editable install asks git each time instead."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        # A process of its own: the project is not importable where it is being built.
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-P", str(root / "pipeline" / "setup" / "revision.py")]
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        written = Path(self.build_lib) / "pipeline" / "REVISION"
        written.unlink(missing_ok=True)  # of a build before
        if found.strip():
            written.write_text(found, encoding="utf-8")
