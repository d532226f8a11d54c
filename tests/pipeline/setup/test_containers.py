"""The container files, as far as they can be checked without building them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = [ROOT / "pipeline" / "containers" / name for name in ("Dockerfile", "apptainer.def")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_gets_all_that_the_wheel_is_built_from(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = packages | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    text = path.read_text(encoding="utf-8")
    copied = {
        word
        for line in re.findall(r"^COPY (.*)|^    (\S+) /opt/bld", text, re.MULTILINE)
        for word in " ".join(line).split()
    }
    assert needed <= copied


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_container_has_a_python_that_the_project_runs_on_and_the_gpus_build(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    [version] = re.findall(r"python:3\.(\d+)-slim", text)
    assert 11 <= int(version) < 13 and '".[gpu]"' in text
