"""The wheel, built and installed away from the checkout: everything that a command needs is in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "schemas", "stage1_teacher", "stage2_student")
OTHERS = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; return its output. AssertionError with all its output if it fails."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_", "BLD_"))}
    done = subprocess.run(command, cwd=cwd, env=known | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the working tree into a checkout of one commit.

    A build leaves folders behind, and a release has a revision.
    """
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "REVISION"))
    for name in OTHERS:
        shutil.copy(ROOT / name, folder)
    (folder / ".gitignore").write_text("__pycache__\nbuild/\n*.egg-info/\n", encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "release"]):
        run("git", *arguments, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    script = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    run(sys.executable, "-c", script, cwd=source)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel in it and everything else of this one; return its `bin`."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path alone: what an editable install of the checkout does on start-up is not done again.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_holds_the_packages_their_data_and_nothing_of_the_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.yaml")}
        assert ours <= names, ours - names
    assert {"schemas/README.md", "pipeline/REVISION"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_an_installed_bld_says_the_revision_that_its_wheel_was_built_from(
    source: Path, bin_folder: Path, tmp_path: Path
) -> None:
    revision = run("git", "rev-parse", "HEAD", cwd=source).strip()
    said = run(bin_folder / "bld", "--version", cwd=tmp_path).strip()
    version, _, short = said.removesuffix(")").partition(" (")
    assert version.startswith("bld 0.") and len(short) >= 7 and revision.startswith(short)


def test_an_installed_bld_finds_its_recipes_pins_and_modules(bin_folder: Path, tmp_path: Path) -> None:
    script = (
        "from importlib.util import find_spec; from pipeline.config.loading import *; "
        "print(find_spec('stage2_student.interfaces.linear').origin); "
        "print(*[load_recipe(name).teacher.model for name in recipe_names()], sep='\\n')"
    )
    where, *models = run(bin_folder / "python", "-c", script, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(bin_folder.parent) and len(models) >= 6
    assert "to be downloaded" in run(bin_folder / "bld", "plan", "demo", cwd=tmp_path, BLD_CACHE=str(tmp_path / "none"))
