"""Claims on a dump in an object store: a lease is an object under `claims/`, which only one process can create.

A lease names the process that holds it, and counts from when it was last written: its holder writes it again while it works. It is over
once `LEASE_SECONDS` have passed, or at once for a process of this machine that is gone. Clocks that differ, or a holder that was
only slow, cost a shard made twice: the shard's own PUT decides (`schemas.storage.object_store.create`).
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from socket import gethostname
from types import TracebackType
from typing import Self

import psutil

from schemas.storage import object_store as objects
from schemas.storage.locations import RemotePath

LEASE_SECONDS = 600.0  # more than a batch takes, after each of which it is renewed, and than an engine takes to start
_WAIT_SECONDS = 5.0
_TURN_SECONDS = 0.2
_JSON = "json"


class StoreClaims:
    """This process's leases."""

    def __init__(self, dump: RemotePath) -> None:
        """Raises StoreError where the store cannot be written, ValueError where it does not keep to conditions."""
        objects.check_writable(dump)
        self._folder = dump / "claims"
        process = psutil.Process()
        holder = {"host": gethostname(), "pid": os.getpid(), "started": process.create_time(), "id": uuid.uuid4().hex}
        self._holder = json.dumps(holder).encode()
        self._written: dict[str, float] = {}  # ours: when they were last written, monotonic seconds
        self._check_store(holder["id"])

    def _check_store(self, name: str) -> None:
        probe = self._folder / f"probe-{name}"
        objects.create(probe, self._holder)
        kept = not objects.create(probe, self._holder)
        objects.remove(probe)
        if not kept:
            raise ValueError(
                f"{self._folder.parent}: this store overwrites an object that was to be new (it ignores If-None-Match: *), so that "
                "nothing there can be committed once. Give a local dump.path, and copy the dump there when it is complete."
            )

    def take(self, shard: int) -> bool:
        return self._take(_name(shard))

    def _take(self, name: str) -> bool:
        path = self._folder / name
        if name not in self._written and not objects.create(path, self._holder):
            held = objects.read(path)
            if held is None:  # given back just now; whoever looks next may have it
                return False
            # Ours where only the answer to our request was lost.
            if held.content != self._holder and not (
                _is_over(held) and objects.replace(path, self._holder, held.e_tag)
            ):
                return False
        self._written.setdefault(name, time.monotonic())
        return True

    def give_back(self, shard: int) -> None:
        self._give_back(_name(shard))

    def _give_back(self, name: str) -> None:
        if self._written.pop(name, None) is not None:
            objects.remove(self._folder / name)

    def keep(self) -> None:
        now = time.monotonic()
        for name, written in self._written.items():
            if now - written > LEASE_SECONDS / 3:
                objects.replace(self._folder / name, self._holder)
                self._written[name] = now

    def wait(self) -> bool:
        time.sleep(_WAIT_SECONDS)
        return True

    @contextmanager
    def writing_json(self) -> Iterator[None]:
        while not self._take(_JSON):
            time.sleep(_TURN_SECONDS)
        try:
            yield
        finally:
            self._give_back(_JSON)

    def remove_dead_partials(self) -> None:
        """There are none: what was cut off in the middle of an upload is no object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._written):
            self._give_back(name)


def _name(shard: int) -> str:
    return f"part-{shard:05d}"


def _is_over(held: objects.Held) -> bool:
    if (datetime.now(UTC) - held.modified).total_seconds() > LEASE_SECONDS:
        return True
    holder = json.loads(held.content)
    return bool(holder["host"] == gethostname() and not _is_alive(holder["pid"], holder["started"]))


def _is_alive(pid: int, started: float) -> bool:
    """Whether the process that began at `started` still runs. One that /proc hides (hidepid, another user's) counts as that process."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1  # a number is used again after a while
    except psutil.Error:
        return _exists(pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing, and asks the kernel, not /proc
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True
