"""Child processes that end with the process that started them, even if that one is killed.

Engines, launchers and their workers are third-party programs. Some of them outlive the command that started them and
hold a GPU or a run's lock unnoticed. A small watcher process therefore remembers the descendants of its parent, and
kills them when the parent is gone. The watcher runs this file by itself, so nothing of the project is imported here.
"""

import atexit
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

_MARK = "BLD_STARTED_BY"  # in the environment of every later descendant, even if its parents are gone
SAFE_PATH = "PYTHONSAFEPATH"  # any value keeps the current folder off Python's path
# Listing all descendants takes some ms on a machine with thousands of processes.
_LOOK_SECONDS, _REMEMBER_SECONDS = 0.2, 2.0
_ROUNDS = 50  # of killing processes started in the meantime, a tenth of a second each


def child_environment() -> dict[str, str]:
    """Return the environment of a Python child process, which finds this project but nothing in its working folder.

    `python -m` searches the current folder first, and an operator's folder may hold a package named `pipeline`.
    """
    # An empty entry would be the current folder.
    known = (path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)
    paths = [str(Path(__file__).resolve().parents[2]), *known]
    return {**os.environ, SAFE_PATH: "1", "PYTHONPATH": os.pathsep.join(paths)}


@cache
def end_children_with_me() -> None:
    """Make every process started from now on, and its descendants, end within seconds of this one.

    It does not matter how this process ends.
    """
    owner = os.getpid()
    os.environ[_MARK] = f"{owner}-{time.time_ns()}"
    # -P: modules beside this file have names that the standard library uses.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(owner), os.environ[_MARK]]
    watcher = subprocess.Popen(  # in its own session: a Ctrl-C at the terminal does not reach it
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
    )

    def stop_watcher() -> None:
        if os.getpid() == owner:  # not in a fork
            watcher.kill()
            watcher.wait()

    atexit.register(stop_watcher)


def watch(owner: int, mark: str) -> None:
    """Wait until the parent, process `owner`, is gone; then kill its descendants."""
    known: set[psutil.Process] = set()
    remembered = 0.0
    while os.getppid() == owner:
        if time.monotonic() - remembered > _REMEMBER_SECONDS:
            known.update(descendants(owner))
            known = {process for process in known if process.is_running()}
            remembered = time.monotonic()
        time.sleep(_LOOK_SECONDS)
    killed: set[psutil.Process] = set()
    for _ in range(_ROUNDS):
        known |= {process for process in psutil.process_iter() if _is_marked(process, mark)}
        known.update(descendants(*(process.pid for process in known if _is_alive(process))))
        alive = {process for process in known if process.pid != os.getpid() and _is_alive(process)}
        if not alive:
            break
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        killed |= alive
        time.sleep(0.1)
    if killed:
        with suppress(OSError):  # the terminal may be gone as well
            print(f"process {owner} is gone; ended {len(killed)} processes that it had started", file=sys.stderr)


def descendants(*pids: int) -> list[psutil.Process]:
    """List the processes below these.

    psutil's own `children` fails if any process is hidden, as other users' processes are under hidepid.
    """
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            children.setdefault(process.ppid(), []).append(process)
    found, parents = [], list(pids)
    while parents:
        below = children.pop(parents.pop(), [])
        found += below
        parents += [process.pid for process in below]
    return found


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
