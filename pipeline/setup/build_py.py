"""Build step that writes the source revision into a wheel. Only the build of a wheel imports it (pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """A build step that copies the packages and writes the revision. An editable install asks git each time instead."""

    def run(self) -> None:
        """Copy the packages; unless the install is editable, write the revision beside them."""
        super().run()
        if self.editable_mode:
            return
        # In a separate process: the project cannot be imported where it is built.
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-P", str(root / "pipeline" / "setup" / "revision.py")]
        revision = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        written = Path(self.build_lib) / "pipeline" / "REVISION"
        written.unlink(missing_ok=True)  # from an earlier build
        if revision.strip():
            written.write_text(revision, encoding="utf-8")
