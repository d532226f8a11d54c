"""Version of the program."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version

from pipeline.setup.revision import revision


def version_text() -> str:
    """Return `bld 0.2.0 (9f2c1ab)`: the release, and the git revision that runs or that the wheel was built from."""
    try:
        text = f"bld {package_version('byte-level-distillation')}"
    except PackageNotFoundError:
        text = "bld, not installed: run from its folder"
    git_revision = revision()
    return text if git_revision is None else f"{text} ({git_revision})"
