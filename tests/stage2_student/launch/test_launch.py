"""The command that starts the ranks, and what they find when they start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.config.loading import load_recipe
from pipeline.runtime.child_processes import child_environment
from stage2_student.launch import launch
from stage2_student.launch.launch import launch_command, launch_student
from tests.support.small_dumps import recipe_in

ROOT = Path(__file__).parents[3]


def test_a_hostfile_starts_deepspeeds_launcher_over_its_machines(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    train = recipe_in(tmp_path, hostfile=str(hostfile), num_processes=3).train
    command = " ".join(launch_command(Path("r.yaml"), train, 1234))
    assert f"-m deepspeed.launcher.runner --quiet --hostfile={hostfile} --master_port=1234" in command
    assert command.endswith("--no_local_rank " + str(ROOT / "stage2_student/launch/rank.py") + " --recipe r.yaml")
    with pytest.raises(ValueError, match=r"train.hostfile: .* is not a file"):
        launch_student(recipe_in(tmp_path, hostfile=str(hostfile)), dry_run=True)


def test_on_one_machine_deepspeeds_launcher_leaves_the_last_word_to_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.launcher import launch as deepspeeds

    command = launch_command(Path("r.yaml"), recipe_in(tmp_path, num_processes=2).train, 1234)
    monkeypatch.setattr(sys, "argv", command[command.index("deepspeed.launcher.launch") :])
    read = deepspeeds.parse_args()
    assert read.log_level == "critical" and not read.quiet  # it would say of a rank that ended only its exit code
    assert read.training_script == str(ROOT / "stage2_student/launch/rank.py")


def test_deepspeeds_own_launcher_understands_both_commands(tmp_path: Path) -> None:
    from deepspeed.launcher import runner

    (tmp_path / "hosts").write_text("alpha slots=2\nbeta slots=4\n")
    train = recipe_in(tmp_path, hostfile=str(tmp_path / "hosts")).train
    command = launch_command(Path("r.yaml"), train, 1234)
    read = runner.parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    assert (read.user_script, read.user_args) == (str(ROOT / "stage2_student/launch/rank.py"), ["--recipe", "r.yaml"])
    assert not read.module and read.no_local_rank and read.launcher == "pdsh"
    assert dict(runner.fetch_hostfile(read.hostfile)) == {"alpha": 2, "beta": 4}


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_cpu_the_ranks_keep_freed_memory_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(launch, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    found = launch._environment(TrainConfig())
    assert found["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert [found.get(name) for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_")] == (
        [None, None] if gpu else ["glibc.malloc.hugetlb=1", str(8 << 30)]
    )


@pytest.mark.parametrize(("ignored", "code"), [(False, 143), (True, 0)])
def test_a_closed_terminal_is_a_sigterm_to_the_ranks_but_under_nohup(ignored: bool, code: int) -> None:
    launcher = "print('started', flush=True); input()"
    script = (
        f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        f"from stage2_student.launch import launch\n"
        f"sys.exit(launch._run([sys.executable, '-c', {launcher!r}], dict(os.environ))[0])\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGHUP)
        if ignored:
            process.stdin.write("on\n")
            process.stdin.close()
        assert process.wait(60) == code


def test_a_second_command_for_a_run_does_not_change_what_the_ranks_of_the_first_are_about_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    def ranks(command: list[str], environment: dict[str, str]) -> tuple[int, list[int]]:
        if not read:  # they are slow to start, and somebody else is quick
            read.append(0.0)
            launch_student(recipe_in(tmp_path, lr=0.5))
        read.append(load_recipe(command[command.index("--recipe") + 1]).train.lr)
        return 0, []

    monkeypatch.setattr(launch, "_run", ranks)
    monkeypatch.setattr(launch, "end_children_with_me", lambda: None)
    launch_student(recipe_in(tmp_path, lr=0.25))
    assert read == [0.0, 0.5, 0.25]
    assert not list((tmp_path / "run").glob("launch*"))


def test_a_rank_imports_this_project_where_deepspeed_puts_the_operators_folder_first(tmp_path: Path) -> None:
    for name in ("pipeline", "schemas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the operator has a package of that name')\n")
    command = launch_command(Path("r.yaml"), TrainConfig(), 1234)
    rank = command[command.index("--no_local_rank") + 1 : -2]
    asked = [sys.executable, "-u", *(["-m"] if rank[0] == "--module" else []), rank[-1], "--help"]
    # As DeepSpeed's launcher of several machines has it.
    environment = {**child_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Train a student from a dump" in done.stdout, done.stderr
