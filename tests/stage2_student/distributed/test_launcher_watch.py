"""A rank ends with the process that started it: a launcher, or the server of an ssh connection."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from stage2_student.distributed import launcher_watch
from stage2_student.distributed.launcher_watch import watched_of

ROOT = Path(__file__).parents[3]
# Each argument but the first names a process, which starts the next one; the last is the rank. It says who they are, by
# id.
CHAIN = """
import os, subprocess, sys, time
from pathlib import Path

Path("/proc/self/comm").write_text(sys.argv[2])
if len(sys.argv) > 3:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], *sys.argv[3:]])
    time.sleep(600)
from stage2_student.distributed.launcher_watch import end_with_ancestors
end_with_ancestors(over_ssh="sshd" in os.environ["OVER"])
import psutil
print(os.getpid(), *(parent.pid for parent in psutil.Process().parents()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("names", "over_ssh", "watched"),
    [
        (["python", "bash", "sshd", "sshd", "systemd"], True, 3),
        (["python", "sshd-session", "sshd"], True, 2),
        (["python", "bash", "sshd"], False, 1),  # of the operator's own log-in: the run may go on without it
        (["python", "tailscaled"], True, 1),
        ([], True, 0),
    ],
)
def test_over_ssh_a_rank_ends_with_the_server_of_the_connection_and_else_with_its_parent(
    names: list[str], over_ssh: bool, watched: int
) -> None:
    parents: Any = [SimpleNamespace(name=lambda name=name: name) for name in names]
    assert watched_of(parents, over_ssh) == parents[:watched]


@pytest.mark.parametrize(
    ("names", "killed"),
    [(["starter", "launcher", "rank"], 0), (["sshd", "bash", "launcher", "rank"], 2)],
    ids=["launcher", "server"],
)
def test_a_rank_ends_in_words_when_what_started_it_is_killed(names: list[str], killed: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OVER": names[0]}
    first = subprocess.Popen(
        [sys.executable, "-c", CHAIN, CHAIN, *names],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None and first.stderr is not None
        rank, *parents = (int(pid) for pid in first.stdout.readline().split())
        os.kill(parents[killed], signal.SIGKILL)
        said = first.stderr.readline()  # the others sleep
        assert f"process {parents[killed]}, which started this rank, is gone; the rank exits too" in said
        psutil.wait_procs([psutil.Process(rank)] if psutil.pid_exists(rank) else [], timeout=30)
        assert not psutil.pid_exists(rank) or psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


def test_where_processes_of_others_are_hidden_a_rank_starts_and_ends_with_its_parent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under /proc with hidepid=1, only the number of root's process is known, as for a step of srun."""

    def hidden(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    started: list[Any] = []
    monkeypatch.setattr(psutil.Process, "parent", hidden)
    monkeypatch.setattr(
        launcher_watch.threading, "Thread", lambda **given: started.append(given) or SimpleNamespace(start=int)
    )
    monkeypatch.setattr(launcher_watch, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(launcher_watch.os, "_exit", lambda code: started.append(code))
    launcher_watch.end_with_ancestors.__wrapped__(over_ssh=True)
    assert started[0]["args"] == ([], os.getppid())
    numbers = iter([77, 77, 1])
    monkeypatch.setattr(launcher_watch.os, "getppid", lambda: next(numbers))
    launcher_watch._watch([], 77)
    assert started[1] == 1 and "process 77, which started this rank, is gone" in capsys.readouterr().err
