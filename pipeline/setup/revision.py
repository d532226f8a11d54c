"""Which revision of the source this is: git's word in a checkout, what the wheel was built from elsewhere. Standard
library only.

`python -m pipeline.setup.revision` prints it; the build of a wheel runs that (`pipeline.setup.build_py`), and a
container's puts the file there, for it has no git.
"""

import subprocess
from pathlib import Path

FILE = "REVISION"  # beside this module, in a wheel


def git_revision(root: Path) -> str | None:
    """`9f2c1ab`, with `-dirty` after it where files differ; None where `root` is no checkout or git is not
    installed.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def revision() -> str | None:
    """Of the code that runs."""
    here = Path(__file__).resolve().parents[1]
    written = here / FILE
    return written.read_text(encoding="utf-8").strip() if written.exists() else git_revision(here.parent)


if __name__ == "__main__":
    print(revision() or "")
