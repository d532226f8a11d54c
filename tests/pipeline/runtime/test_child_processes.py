"""Descendants of a process end with it, however it ends and however they were started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from pipeline.runtime.child_processes import child_environment, descendants

ROOT = Path(__file__).parents[3]
# A child of each kind, each of which writes its id: one that executes another program, one in a session of its own
# whose parent ends at once, and one that is forked, and has the environment that its parent began with.
FAMILY = """
import os, subprocess, sys, time
from pipeline.runtime.child_processes import end_children_with_me

end_children_with_me()
end_children_with_me()  # once is enough
sleeps = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
subprocess.Popen(sleeps)
orphan = f"import subprocess; subprocess.Popen({sleeps!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan])
forked = os.fork()
if forked == 0:
    time.sleep(600)
print(forked, flush=True)
END
"""


def family(end: str) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    """Start a process that ends as it is told; return it and its descendants."""
    command = [sys.executable, "-c", FAMILY.replace("END", end)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [psutil.Process(int(process.stdout.readline())) for _ in range(3)]


def ended(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Tell if all of them end within a while; a zombie may have nobody to reap it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.1)
    return False


def test_all_that_a_killed_process_has_started_is_killed_in_words() -> None:
    process, started = family("time.sleep(600)")
    time.sleep(2.5)  # until what was forked has been seen
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert ended(started, 30)
    assert process.stderr is not None
    assert f"process {process.pid} is gone; ended 3 processes that it had started" in process.stderr.read()


@pytest.mark.parametrize("end", ["sys.stdin.read()", "sys.stdin.read(); raise SystemExit(3)"])
def test_a_process_that_ends_by_itself_ends_its_watcher_and_leaves_what_it_leaves(end: str) -> None:
    process, started = family(end)
    assert process.stdin is not None
    [watcher] = [
        child for child in psutil.Process(process.pid).children() if "child_processes.py" in str(child.cmdline())
    ]
    process.stdin.close()
    assert process.wait() in (0, 3)
    try:
        assert ended([watcher], 30) and all(child.is_running() for child in started)
    finally:
        for child in started:
            os.kill(child.pid, signal.SIGKILL)


def test_descendants_are_found_where_processes_of_others_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate /proc with hidepid=1, where psutil's own `children` raises AccessDenied."""
    parent_of = psutil.Process.ppid

    def ppid(process: psutil.Process) -> int:
        if process.pid == 1:
            raise psutil.AccessDenied(process.pid)
        return parent_of(process)

    monkeypatch.setattr(psutil.Process, "ppid", ppid)
    sleep = "print(1, flush=True); import time; time.sleep(600)"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    with subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            below = descendants(os.getpid())
            assert process.pid in [child.pid for child in below]
            assert [child.ppid() for child in descendants(process.pid)] == [process.pid]
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_child_imports_this_project_whatever_the_folder_that_it_runs_in_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.py").write_text("__path__ = []\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep)  # empty entries: the current folder
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = [sys.executable, "-c", "import pipeline; print(pipeline.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=True)
    assert found.stdout == f"{ROOT / 'pipeline' / '__init__.py'}\n"
