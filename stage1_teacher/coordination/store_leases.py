"""Shard locks in an object store: a lease is an object under `claims/` that only one process can create.

A lease names its holder and is valid from the time it was last written; the holder rewrites it while it works. It
expires after `LEASE_SECONDS`, or at once if its holder was a process of this machine that has ended. Skewed clocks, or
a holder that was merely slow, cost a shard made twice; which copy counts is decided by the shard's own PUT
(`schemas.storage.object_store.create`).
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from socket import gethostname
from types import TracebackType
from typing import Self

import psutil

from pipeline.runtime import log
from schemas import dump_files
from schemas.storage import object_store
from schemas.storage.locations import RemotePath

LEASE_SECONDS = 600.0  # longer than an engine's start, and than a batch, after each of which the lease is renewed
_WAIT_SECONDS = 5.0
_TURN_SECONDS = 0.2
_JSON, _PLAN = "json", "plan"


class StoreClaims:
    """Leases of this process on a dump."""

    def __init__(self, dump: RemotePath, key: str = "dump.path") -> None:
        """Check the store. Raises StoreError if it cannot be written, ValueError if it ignores conditional requests."""
        object_store.check_writable(dump, key)
        self._folder = dump / dump_files.LEASES
        process = psutil.Process()
        holder = {"host": gethostname(), "pid": os.getpid(), "started": process.create_time(), "id": uuid.uuid4().hex}
        self._holder = json.dumps(holder).encode()
        self._written: dict[str, float] = {}  # ours: when they were last written, monotonic seconds
        self._check_store(holder["id"], key)

    def _check_store(self, name: str, key: str) -> None:
        probe = self._folder / f"probe-{name}"
        object_store.create(probe, self._holder)
        kept = not object_store.create(probe, self._holder)
        object_store.remove(probe)
        if not kept:
            raise ValueError(
                f"{self._folder.parent}: this store overwrites existing objects (it ignores If-None-Match: *), so two "
                f"processes could overwrite each other's shards. Give a local {key}, and copy the folder there when "
                "it is complete."
            )

    def take(self, shard: int) -> bool:
        return self._take(dump_files.part_name(shard))

    def _take(self, name: str) -> bool:
        path = self._folder / name
        if name not in self._written and not object_store.create(path, self._holder):
            held = object_store.read(path)
            if held is None:  # released just now; the next caller may take it
                return False
            # It is ours if only the response to our request was lost.
            if held.content != self._holder and not (
                _is_over(held) and object_store.replace(path, self._holder, held.e_tag)
            ):
                return False
        self._written.setdefault(name, time.monotonic())
        return True

    def give_back(self, shard: int) -> None:
        self._give_back(dump_files.part_name(shard))

    def _give_back(self, name: str) -> None:
        if self._written.pop(name, None) is not None:
            object_store.remove(self._folder / name)

    def renew(self) -> None:
        now = time.monotonic()
        for name, written in self._written.items():
            if now - written > LEASE_SECONDS / 3:
                object_store.replace(self._folder / name, self._holder)
                self._written[name] = now

    def wait(self) -> bool:
        time.sleep(_WAIT_SECONDS)
        return True

    def writing_json(self) -> AbstractContextManager[None]:
        return self._holding(_JSON, _TURN_SECONDS)

    @contextmanager
    def planning(self) -> Iterator[None]:
        if not self._take(_PLAN):
            log.info(f"{self._folder.parent}: waiting for the process that plans it")
        with self._holding(_PLAN, _WAIT_SECONDS):
            yield

    @contextmanager
    def _holding(self, name: str, pause: float) -> Iterator[None]:
        while not self._take(name):
            time.sleep(pause)
        try:
            yield
        finally:
            self._give_back(name)

    def remove_dead_partials(self) -> None:
        """Do nothing: an interrupted upload leaves no object behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._written):
            self._give_back(name)


def _is_over(held: object_store.StoredObject) -> bool:
    if (datetime.now(UTC) - held.modified).total_seconds() > LEASE_SECONDS:
        return True
    holder = json.loads(held.content)
    return bool(holder["host"] == gethostname() and not _is_alive(holder["pid"], holder["started"]))


def _is_alive(pid: int, started: float) -> bool:
    """Return whether the process that began at `started` still runs; one that /proc hides counts as running."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1  # pids are reused
    except psutil.Error:
        return _exists(pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends no signal, and asks the kernel rather than /proc
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True
