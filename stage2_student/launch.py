"""Start the training under the DeepSpeed launcher, one process per rank on this machine.

The launcher's local half is called directly: its outer half looks for ssh and a hostfile, and on a CPU counts devices
with numactl, none of which one machine needs.
"""

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from pipeline.config import Recipe
from pipeline.recipe import load_recipe, save_recipe
from stage2_student.run_folder import dump_refs
from stage2_student.start import student_config


def launch_command(recipe_path: Path, num_processes: int, port: int) -> list[str]:
    """The command that trains the recipe on ranks 0 .. num_processes."""
    world = json.dumps({"localhost": list(range(num_processes))})
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--quiet"),
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
        *("--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank", "--module"),
        *("stage2_student.train", "--recipe", str(recipe_path)),
    ]


def launch_student(recipe: Recipe | Path | str, dry_run: bool = False) -> int:
    """Train, or resume; returns the exit code of the launcher. With `dry_run` the command is only printed."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = Path(student_config(loaded).path)
    command = launch_command(run / "launch.yaml", loaded.train.num_processes, free_port())
    if dry_run:
        dumps = ", ".join(ref.path for ref in dump_refs(loaded))
        print(f"dump {dumps} -> run {run}, {loaded.train.steps} steps:\n{' '.join(command)}")
        return 0
    run.mkdir(parents=True, exist_ok=True)
    save_recipe(loaded, run / "launch.yaml")
    return subprocess.run(command, env=_environment(loaded.train.num_processes)).returncode


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(num_processes: int) -> dict[str, str]:
    """Ours, with this project importable, and the cores shared among the ranks: each would take all of them."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // num_processes)), "TOKENIZERS_PARALLELISM": "true"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
