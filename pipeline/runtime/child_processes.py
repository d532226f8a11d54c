"""Nothing is left behind: the processes that this one starts end with it, even where it is killed and can end nothing
itself.

Engines, launchers and their workers are others' programs, some of which go on without the one that wanted them, hold a
GPU or a run's lock, and are seen by nobody. So a small process of ours watches: it remembers what descends from its
parent, and kills it when that is gone. It is this file, run by itself, that is why nothing of the project is imported
here.
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

_MARK = "BLD_STARTED_BY"  # in the environment of all that is started from here on, however its parents come and go
SAFE_PATH = "PYTHONSAFEPATH"  # set to anything: the current folder is not on Python's path
_LOOK_SECONDS, _REMEMBER_SECONDS = (
    0.2,
    2.0,
)  # to look for all descendants takes some ms on a machine with thousands of processes
_ROUNDS = 50  # of killing what was started meanwhile, a tenth of a second each


def child_environment() -> dict[str, str]:
    """Return the environment of a Python that this project starts: it finds the project, and nothing by the folder that
    it runs in.

    `python -m` looks into the current folder before all else, and a folder of the operator's may well hold a package
    named `pipeline`.
    """
    known = (path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)  # an empty one is the folder
    paths = [str(Path(__file__).resolve().parents[2]), *known]
    return {**os.environ, SAFE_PATH: "1", "PYTHONPATH": os.pathsep.join(paths)}


@cache
def end_children_with_me() -> None:
    """From here on what this process starts, and what that starts, ends within seconds of it, in whatever way it
    ends.
    """
    owner = os.getpid()
    os.environ[_MARK] = f"{owner}-{time.time_ns()}"
    # -P: modules beside this file have names of the standard library's.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(owner), os.environ[_MARK]]
    watcher = subprocess.Popen(  # of its own session: a Ctrl-C at the terminal is not for it
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
    )

    def ends() -> None:
        if os.getpid() == owner:  # not a fork of it
            watcher.kill()
            watcher.wait()

    atexit.register(ends)


def watch(owner: int, mark: str) -> None:
    """Wait until the parent, process `owner`, is gone; then kill what has descended from it."""
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
    """The processes below these. psutil's own `children` fails where any process is hidden, as all of other users are
    under hidepid.
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
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
