"""A rank ends with what started it: a rank whose launcher is gone would train on unseen, and hold the run.

Its parent is DeepSpeed's launcher, an agent of torchrun, or a step of srun. On a machine that ssh has reached it is the
server's process for that connection too, which ends with the connection, and so with the command at the other end of
it.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import psutil

from pipeline.runtime import log

_LOOK_SECONDS = 0.5


@cache
def end_with_ancestors(over_ssh: bool) -> None:
    """Watch them in a thread for as long as this process lives; where one is gone, end at once, whatever is under way.

    Args:
        over_ssh: ssh has started the launcher on this machine.
    """
    watched = watched_of(_seen_parents(), over_ssh)
    threading.Thread(target=_watch, args=(watched, os.getppid()), name="ancestors", daemon=True).start()


def _seen_parents() -> list[psutil.Process]:
    """This process' parents, nearest first, up to the first that is hidden: root's are, where /proc is mounted with
    hidepid.
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
    """Of a process' parents, nearest first, those that it ends with: the first; over ssh all up to the connection's
    server, if any is.
    """
    servers = [number for number, parent in enumerate(parents, 1) if parent.name().startswith("sshd")]
    return parents[: servers[0] if over_ssh and servers else 1]


def _watch(watched: Sequence[psutil.Process], parent: int) -> None:
    """`parent` is watched too, by its number alone: it may be hidden."""
    while not (gone := [process.pid for process in watched if not _is_there(process)]) and os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    log.error(
        f"process {gone[0] if gone else parent}, which started this rank, is gone; the rank ends with it. The same command goes on"
    )
    os._exit(1)


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
