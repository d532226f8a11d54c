"""Shard locks: several processes work on one dump, and each skips the shards that another one is making.

Claims only save work: a shard that two processes make anyway is committed once, whole, by whichever is first.

In a folder, the process that makes shard i locks byte i of the file `claims.lock`; the one that writes a JSON file, or
plans the dump, locks a byte far beyond those. The kernel releases the locks when a process ends, however it ends, so a
claim is never stale; the file stays empty. Byte-range locks also work between machines that share a folder over NFS
version 4. An object store has no locks; see `stage1_teacher.coordination.store_leases`.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pipeline.runtime import log
from schemas import dump_files
from schemas.storage.locations import Location, RemotePath

_JSON_BYTE, _PLAN_BYTE = 1 << 40, 1 << 41


class Claims(Protocol):
    """Claims of this process on a dump; a context manager that releases them all."""

    def take(self, shard: int) -> bool:
        """Claim a shard. Returns False if another process holds it; claiming a shard twice is harmless."""

    def give_back(self, shard: int) -> None:
        """Release a shard that is complete, or that this process will not make."""

    def renew(self) -> None:
        """Keep the claims alive; called after each batch."""

    def wait(self) -> bool:
        """Wait briefly for others' claims to expire, and return True; return False at once where they never do."""

    def writing_json(self) -> AbstractContextManager[None]:
        """Hold the lock on the dump's manifest, recipe, summary and audit; waits until it is free."""

    def planning(self) -> AbstractContextManager[None]:
        """Hold the lock on the plan, which one process makes and the others read; waits until it is free."""

    def remove_dead_partials(self) -> None:
        """Delete partial files of killed processes, except of shards that someone is making now."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def require_place(dump: Location, key: str = "dump.path") -> None:
    """Raise ValueError for a store that cannot hold a dump, without contacting it; `key` is the recipe's."""
    if isinstance(dump, RemotePath):
        from schemas.storage import object_store

        object_store.check_writable(dump, key)


def open_claims(dump: Location, key: str = "dump.path") -> Claims:
    """Open this process's claims on a dump, or on another folder of shards.

    Args:
        key: the recipe's, for messages.
    Raises:
        OSError: the dump cannot be written.
        ValueError: the store cannot hold a dump.
    """
    if isinstance(dump, RemotePath):
        from stage1_teacher.coordination.store_leases import StoreClaims

        return StoreClaims(dump, key)
    return FolderClaims(dump, key)


class FolderClaims:
    """Byte-range locks on one file. At most one per process and dump: closing any file handle releases all of them."""

    def __init__(self, dump: Path, key: str = "dump.path") -> None:
        """Open the lock file. Raises OSError if the folder cannot be written."""
        self._dump, self._path = dump, dump / dump_files.LOCK
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            raise OSError(f"{dump} cannot be written: {error}. Make it writable, or give another {key}.") from error

    def take(self, shard: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise OSError(
                f"{self._path} cannot be locked: {error}. Put the folder on a file system with byte-range locks (NFS: "
                "version 4), and copy it to its destination when it is complete."
            ) from error
        return True

    def give_back(self, shard: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def renew(self) -> None:
        return

    def wait(self) -> bool:
        return False

    def writing_json(self) -> AbstractContextManager[None]:
        return self._holding(_JSON_BYTE)

    @contextmanager
    def planning(self) -> Iterator[None]:
        if not self.take(_PLAN_BYTE):
            log.info(f"{self._dump}: waiting for the process that plans it")
        with self._holding(_PLAN_BYTE):
            yield

    @contextmanager
    def _holding(self, byte: int) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)
        try:
            yield
        finally:
            self.give_back(byte)

    def remove_dead_partials(self) -> None:
        with self.writing_json():
            # A live process writes these only while it holds this lock.
            for left in self._dump.glob("*.partial"):
                left.unlink(missing_ok=True)
        # Of shards and their costs.
        for left in (path for pattern in dump_files.PARTIAL_FILES for path in self._dump.glob(pattern)):
            index = dump_files.part_index(left.name)
            if self.take(index):
                left.unlink(missing_ok=True)
                self.give_back(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
