"""The container files, as far as they can be checked without building them."""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
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


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield a Dockerfile's instructions with their arguments; continued lines are joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    for line in lines.splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


def complaints(text: str) -> list[str]:
    """Return what a linter of Dockerfiles would complain of, in its rules' words."""
    found, steps = [], list(instructions(text))
    names = [name for name, _ in steps]
    known = {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "ENTRYPOINT", "CMD"}
    found += [f"unknown or discouraged instruction {name}" for name in names if name not in known]
    last = dict(steps)  # the last of each
    for name, arguments in steps:
        if name == "FROM" and not re.fullmatch(r"\S+:(?!latest)[\w.-]+", arguments):
            found.append(f"FROM without a pinned tag: {arguments}")
        if name == "WORKDIR" and not arguments.startswith("/"):
            found.append(f"WORKDIR is relative: {arguments}")
        if name in ("SHELL", "ENTRYPOINT", "CMD"):
            try:
                json.loads(arguments)
            except json.JSONDecodeError:
                found.append(f"{name} is not a JSON list: {arguments}")
        if name == "RUN":
            found += run_complaints(arguments)
    if last.get("USER", "root") in ("root", "0"):
        found.append("the last USER is root")
    if "|" in "".join(arguments.replace("||", "") for name, arguments in steps if name == "RUN"):
        found += [] if "pipefail" in last.get("SHELL", "") else ["a pipe without pipefail"]
    return found


def run_complaints(command: str) -> list[str]:
    """Return complaints about a shell command that builds an image."""
    found = []
    if re.search(r"\bsudo\b|(^|&& )cd ", command):
        found.append(f"sudo, or cd instead of WORKDIR: {command}")
    for part in command.split("&&"):
        words = part.split()
        if words[:2] == ["apt-get", "install"]:
            found += [
                f"{flag} is missing: {part}" for flag in ("--yes", "--no-install-recommends") if flag not in words
            ]
            if "rm -rf /var/lib/apt/lists/*" not in command:
                found.append(f"the package lists stay: {command}")
        if words[:2] == ["pip", "install"]:
            found += [] if "--no-cache-dir" in words else [f"pip keeps its cache: {part}"]
            packages = [word.strip("'\"") for word in words[2:] if not word.startswith("-")]
            found += [f"a version is not pinned: {name}" for name in packages if not re.search("[=<>~]", name)]
    return found


def test_the_dockerfile_passes_the_rules_of_a_linter_and_a_bad_one_does_not() -> None:
    assert complaints(FILES[0].read_text(encoding="utf-8")) == []
    bad = "FROM python\nWORKDIR opt\nADD a b\nRUN cd x && pip install uv && apt-get install gcc | tee log\nCMD bld\n"
    assert len(complaints(bad)) == 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_containers_commands_are_shell_and_name_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".def":
        sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)*)", text, re.MULTILINE))
        assert sections.keys() == {"arguments", "files", "post", "runscript", "test"}
        scripts = [sections[name] for name in ("post", "runscript", "test")]
        assert scripts[0].lstrip().startswith("set -eu")
    else:
        scripts = [arguments for name, arguments in instructions(text) if name == "RUN"]
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    named = set(re.findall(r"pipeline/setup/[\w/.]+|pipeline/containers/\w[\w.]*", text))
    assert named and all((ROOT / name).is_file() for name in named)
    assert max(map(len, text.splitlines())) <= 120
