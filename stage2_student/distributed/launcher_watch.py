"""Ends a rank when its launcher is gone: it would otherwise train on unseen, and keep the run locked.

The parent of a rank is DeepSpeed's launcher, a torchrun agent or an srun step. On a machine reached by ssh, the rank
also ends with the sshd process of that connection, and so with the command at its other end.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import psutil

from pipeline.runtime import log

_POLL_SECONDS = 0.5


@cache
def end_with_ancestors(over_ssh: bool) -> None:
    """Watch this process's ancestors in a thread, and exit at once when one is gone, whatever is under way.

    Args:
        over_ssh: the launcher on this machine was started by ssh.
    """
    watched = watched_of(_seen_parents(), over_ssh)
    threading.Thread(target=_watch, args=(watched, os.getppid()), name="ancestors", daemon=True).start()


def _seen_parents() -> list[psutil.Process]:
    """Return this process's ancestors, nearest first, up to the first hidden one.

    Root's processes are hidden if /proc is mounted with hidepid.
    """
    parents: list[psutil.Process] = []
    with suppress(psutil.Error):
        process = psutil.Process()
        while (parent := process.parent()) is not None:
            parent.name()
            parents.append(parent)
            process = parent
    return parents


def watched_of(parents: Sequence[psutil.Process], over_ssh: bool) -> Sequence[psutil.Process]:
    """Select the ancestors that a process ends with, from all of them, nearest first.

    The first one; over ssh, all up to the connection's sshd, if there is one.
    """
    servers = [number for number, parent in enumerate(parents, 1) if parent.name().startswith("sshd")]
    return parents[: servers[0] if over_ssh and servers else 1]


def _watch(watched: Sequence[psutil.Process], parent: int) -> None:
    """Exit once one of the processes is gone; `parent` is watched by its process id alone, because it may be hidden."""
    while not (gone := [process.pid for process in watched if not _is_alive(process)]) and os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    log.error(
        f"process {gone[0] if gone else parent}, which started this rank, is gone; the rank exits too. "
        "Rerun the same command to continue"
    )
    os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
