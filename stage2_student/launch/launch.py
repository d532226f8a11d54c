"""Starting of training, one process per rank: here, on a hostfile's machines, or as a rank of torchrun or srun.

On one machine the local half of DeepSpeed's launcher is called directly: the outer half looks for ssh and a hostfile,
and on a CPU counts devices with numactl, none of which a single machine needs.
"""

import base64
import json
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from pipeline.config import Recipe, TrainConfig, student_config
from pipeline.config.loading import load_recipe, save_recipe
from pipeline.runtime import log, plugins
from pipeline.runtime.child_processes import child_environment, descendants, end_children_with_me
from pipeline.runtime.devices import has_nvidia_gpu
from pipeline.runtime.dtypes import installed
from pipeline.runtime.format import count_of
from stage2_student.acceleration.options import check_options
from stage2_student.distributed.deepspeed_config import deepspeed_config
from stage2_student.distributed.launcher_watch import end_with_ancestors
from stage2_student.distributed.rank_environment import free_port, started_as_rank
from stage2_student.runs.begun import as_begun
from stage2_student.runs.checkpoints import checkpoint_steps
from stage2_student.runs.dump_tokens import check_planned_tokens
from stage2_student.runs.identity import dump_refs
from stage2_student.training.stop_signals import STOPPING

_RANK = str(Path(__file__).resolve().with_name("rank.py"))  # a file: a module is first looked up in the current folder
_SIGNALLED = 128  # a shell's exit code for signal n is this and n
# For a model in host memory, glibc keeps freed memory, in huge pages: a step frees and allocates gigabytes, and having
# the kernel map and clear every page again takes a fifth of its time.
_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}


def launch_command(recipe_path: Path, train: TrainConfig, port: int) -> list[str]:
    """Build the command that trains the recipe: with `num_processes` ranks here, or on the hostfile's machines."""
    rank = ("--no_local_rank", _RANK, "--recipe", str(recipe_path))
    if train.hostfile is not None:
        outer = (sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--quiet", f"--hostfile={train.hostfile}")
        return [*outer, f"--master_port={port}", *rank]
    world = json.dumps({"localhost": list(range(train.num_processes))})
    # Not --quiet, which is the level of errors: that a rank ended is said here, in words that tell how to go on.
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level=critical"),
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
        *("--master_addr=127.0.0.1", f"--master_port={port}"),
        *rank,
    ]


def launch_student(recipe: Recipe | Path | str, dry_run: bool = False) -> int:
    """Train, or resume; returns the exit code as a shell reports it. With `dry_run` the command is only printed.

    If torchrun or srun started this process as a rank, train in this process and launch nothing.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = Path(student_config(loaded).path)
    planned, remarks = checked(loaded)
    if started_as_rank(os.environ) and not dry_run:
        from stage2_student.training.train import run_rank  # seconds to import

        end_with_ancestors(over_ssh=False)
        return run_rank(loaded)
    loaded = planned
    for remark in remarks:
        log.info(f"{run}: {remark}")
    if dry_run:
        command = launch_command(run / "launch.yaml", loaded.train, free_port())
        dumps = ", ".join(ref.path for ref in dump_refs(loaded))
        print(f"dump {dumps} -> run {run}, {count_of(loaded.train.steps, 'step')}:\n{' '.join(command)}")
        return 0
    run.mkdir(parents=True, exist_ok=True)
    end_children_with_me()
    # A unique name: the ranks read the file once they are up, and only then is a second command for this run refused.
    number, name = tempfile.mkstemp(dir=run, prefix="launch-", suffix=".yaml")
    os.close(number)
    try:
        save_recipe(loaded, Path(name))
        command = launch_command(Path(name), loaded.train, free_port())
        code, received = _run(command, _environment(loaded.train))
    finally:
        Path(name).unlink(missing_ok=True)
    if code > _SIGNALLED and not received and code - _SIGNALLED not in STOPPING:
        log.error(_ended_by(run, code - _SIGNALLED))
    # On several machines DeepSpeed's launcher exits with 1 for any signal.
    return _SIGNALLED + received[0] if code == 1 and received and loaded.train.hostfile is not None else code


def _ended_by(run: Path, number: int) -> str:
    """Say that a signal ended a rank, why that may be, and how to go on."""
    steps = checkpoint_steps(run)
    left = (
        f"continues from the checkpoint of step {steps[-1]}" if steps else "starts again, for no checkpoint was saved"
    )
    memory = ", as the system does when memory runs out (train.micro_batch_tokens lowers it)"
    why = memory if number == signal.SIGKILL else ""
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    return f"{run}: a rank was ended by {name}{why}; the same command {left}"


def checked(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the schedule that its run will have, and remarks for the user.

    Raises ValueError for every fault that can be found before a rank is started or a model or shard is opened: in the
    schedule, a package or GPU that an option needs and this machine lacks, a missing hostfile, an unusable DeepSpeed
    JSON, a plug-in that is not a file, a tracker that is not installed, a dump without the tokens that an objective
    compares.
    """
    if installed("deepspeed") is None:
        raise ValueError(
            "training needs DeepSpeed, which is not installed: run `make setup` in a checkout, or "
            f"`{sys.executable} -m pip install byte-level-distillation`"
        )
    deepspeed_config(recipe, 1)
    check_planned_tokens(recipe)
    student, train = student_config(recipe), recipe.train
    if train.hostfile is not None and not Path(train.hostfile).is_file():
        raise ValueError(f"train.hostfile: {train.hostfile} is not a file; give one with lines `NAME slots=RANKS`")
    for key, file in [
        ("student.interface", student.interface),
        *(("train.objectives", f) for f in train.objectives.files.values()),
    ]:
        if plugins.is_own(file) and not Path(file).expanduser().is_file():
            raise ValueError(f"{key}: {file} is not a file (relative to {Path.cwd()}); give the path of a Python file")
    if train.hostfile is None:
        check_options(train, student)
    if train.wandb is not None or train.mlflow is not None:
        from stage2_student.runs.trackers import check_installed  # imports TensorBoard, which takes seconds

        check_installed(train)
    return as_begun(recipe)


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, list[int]]:
    """Run the launcher; returns its exit code, as a shell reports it, and the signals received meanwhile.

    The first SIGTERM or SIGINT is passed to the ranks on this machine, which save and exit; a second one kills them. It
    is not passed to DeepSpeed's local launcher, which would end the ranks one by one, waiting up to 30 seconds for
    each, and a rank cannot save alone. The launcher gets the signal itself if it has no ranks here: before it has
    started them, and with several machines. SIGHUP (a closed terminal) is passed on as SIGTERM. SIGKILL is handled by
    `end_children_with_me`.
    """
    received: list[int] = []
    launched: list[psutil.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.SIGTERM if number == signal.SIGHUP else number)
        for launcher in launched:
            ranks = _ranks(launcher)
            again = len(received) > 1
            for process in [*ranks, launcher] if again else ranks or [launcher]:
                with suppress(psutil.NoSuchProcess):  # it has just exited
                    process.send_signal(signal.SIGKILL if again else received[0])

    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)  # nohup ignores it
    before = {number: signal.signal(number, pass_on) for number in (*STOPPING, *hang_up)}
    try:
        # In its own session, so that Ctrl-C reaches the ranks once, and through us.
        launched.append(psutil.Popen(command, env=environment, start_new_session=True))
        if received:  # during the start
            launched[0].send_signal(received[0])
        return _shell_code(launched[0].wait()), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks(launcher: psutil.Popen) -> list[psutil.Process]:
    """Return the ranks that the launcher has started on this machine."""
    ranks = []
    for process in descendants(launcher.pid):
        with suppress(psutil.Error):  # it has just exited
            words = process.cmdline()
            if _RANK in words and not any(word.startswith("deepspeed.launcher") for word in words):
                ranks.append(process)
    return ranks


def _shell_code(code: int) -> int:
    """Convert the launcher's exit code to a shell's: for a rank ended by signal n it is -n, or 256 - n."""
    if code < 0:
        return _SIGNALLED - code
    return _SIGNALLED + 256 - code if code > 192 else code


def _environment(train: TrainConfig) -> dict[str, str]:
    """Return a child's environment, with the cores divided among the ranks: each would use all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = train.num_processes if train.hostfile is None else 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "TOKENIZERS_PARALLELISM": "true"}
    if not has_nvidia_gpu():
        defaults |= _ALLOCATOR
    return defaults | child_environment()
