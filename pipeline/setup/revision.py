"""Revision of the source: from git in a checkout, otherwise the one the wheel was built from. Standard library only.

`python -m pipeline.setup.revision` prints it. The build of a wheel runs that command (`pipeline.setup.build_py`); the
build of a container, which has no git, supplies the file instead.
"""

import subprocess
from pathlib import Path

FILE = "REVISION"  # in the package `pipeline` of a wheel


def git_revision(root: Path) -> str | None:
    """Return `9f2c1ab`, with `-dirty` appended if files differ; None if `root` is not a checkout or git is missing."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def revision() -> str | None:
    """Return the revision of the running code; None if it is not known."""
    here = Path(__file__).resolve().parents[1]
    written = here / FILE
    return written.read_text(encoding="utf-8").strip() if written.exists() else git_revision(here.parent)


if __name__ == "__main__":
    print(revision() or "")
