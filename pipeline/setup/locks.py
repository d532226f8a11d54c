"""The packages that `make setup` installs, each at one version and by the hashes of its files: locks/common.txt, cpu.txt and gpu.txt.

    python -m pipeline.setup.locks           `make check`: the locks against pyproject.toml, and this environment against the locks
    python -m pipeline.setup.locks --write   `make lock`: resolve anew, keeping the versions that still fit (`--upgrade`: the newest)
    python -m pipeline.setup.locks --audit   `make audit`: known vulnerabilities of what is locked, from PyPI's or OSV's data

uv takes the files as constraints and refuses another version, or a file with another hash. torch, and the CUDA packages that it pins
itself, are not in them: which build it is depends on the machine, and each comes from an index of its own.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.setup.install import (
    CPU_EXCLUDES,
    EXTRAS,
    LOCKS,
    ROOT,
    Device,
    fail,
    find_settings,
    index_arguments,
    pinned_torch,
    torch_arguments,
)

_OF_TORCH = re.compile(r"(torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*)==")
_AUDITOR = "pip-audit>=2.9,<3"
_HEAD = "# Written by `make lock`. Constraints for uv: each package at one version, by the sha256 of its files on the index.\n"


class Pin(NamedTuple):
    """One package at one version, where its marker holds."""

    requirement: Requirement
    num_hashes: int


def blocks(text: str) -> list[str]:
    """The requirements of a lock as they are written, each with its hashes; without those of torch's own making."""
    found = re.findall(r"^[A-Za-z0-9](?:.*\\\n)*.*", text, flags=re.MULTILINE)
    return [block for block in found if not _OF_TORCH.match(block)]


def read_pins(folder: Path, device: Device) -> list[Pin]:
    """What is pinned for a device on this machine."""
    text = "\n".join((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("common", device))
    pins = [
        Pin(Requirement(block.split("\\")[0].strip()), len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)))
        for block in blocks(text)
    ]
    return [pin for pin in pins if pin.requirement.marker is None or pin.requirement.marker.evaluate()]


def faults(pins: Sequence[Pin], wanted: Iterable[Requirement], installed: Mapping[str, str]) -> Iterator[str]:
    """What is wrong, a line each: a pin without a hash, a requirement without a fitting pin, a package of another version.

    Args:
        wanted: of pyproject.toml.
        installed: versions by canonical name; packages that nothing pins are an operator's own.
    """
    by_name = {str(canonicalize_name(pin.requirement.name)): pin for pin in pins}
    versions = {name: next(iter(pin.requirement.specifier)).version for name, pin in by_name.items()}
    for name, pin in by_name.items():
        if not pin.num_hashes:
            yield f"{pin.requirement} is locked without a hash: run `make lock`"
        elif name in installed and not pin.requirement.specifier.contains(installed[name], prereleases=True):
            yield f"{name} {installed[name]} is installed, {pin.requirement} is locked: rm -rf .venv; make setup"
    for requirement in wanted:
        version = versions.get(canonicalize_name(requirement.name))
        if not _OF_TORCH.match(f"{requirement.name}==") and not (version and requirement.specifier.contains(version)):
            yield f"{requirement} of pyproject.toml, locked is {version or 'nothing'}: run `make lock`"


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
    out, excludes = scratch / f"{device}.txt", scratch / "excludes.txt"
    old = [folder / f"{name}.txt" for name in ("common", device)]
    if not upgrade:  # uv keeps the versions that it finds in its output file
        out.write_text("".join(path.read_text(encoding="utf-8") for path in old if path.exists()), encoding="utf-8")
    excludes.write_text("\n".join(CPU_EXCLUDES) + "\n", encoding="utf-8")
    settings, environment = find_settings(Path(sys.executable))
    torch = ["--excludes", str(excludes), *torch_arguments("cpu", settings, pinned_torch(ROOT), sys.version_info[:2])]
    extras = [argument for extra in (device, *EXTRAS) for argument in ("--extra", extra)]
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--python", sys.executable]
    command += ["pyproject.toml", *extras, "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    command += [*(torch if device == "cpu" else []), *index_arguments(settings, environment), "-o", str(out)]
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
        fail(f"uv could not resolve the packages for {device}; what it says above names those that conflict")
    return out.read_text(encoding="utf-8")


def audit(folder: Path) -> int:
    """Ask for known vulnerabilities of all that is locked; the exit status: 0 none, 1 some, or the data cannot be reached."""
    with tempfile.TemporaryDirectory() as scratch:
        worst = 0
        for device in ("cpu", "gpu"):
            path = Path(scratch) / f"{device}.txt"
            path.write_text("".join(f"{pin.requirement}\n" for pin in read_pins(folder, device)), encoding="utf-8")
            # Nothing is installed or resolved: the pins are the whole closure.
            command = ["uvx", "--from", _AUDITOR, "pip-audit", "--disable-pip", "--no-deps", "-r", str(path)]
            command[0] = str(Path(sys.executable).with_name("uvx"))
            _, environment = find_settings(Path(sys.executable))
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
    device: Device = "gpu" if "vllm" in installed else "cpu"
    found = []
    for each in ("cpu", "gpu"):
        there = installed if each == device else {}
        found += list(faults(read_pins(LOCKS, each), requirements(ROOT, each), there))
    for fault in dict.fromkeys(found):
        print(f"locks: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
